"""Small trainable modules in or beside a frozen block's attention and MLP: bottleneck adapters, which PEFT lacks.

A forward hook on the block's own module does the work, so the base's classes stay what they are, its recomputation
under gradient checkpointing runs the adapter too, and taking the hook off leaves the base bit for bit. The adapter is a
child of the module that it serves: `train()`, `eval()` and `to()` reach it. It works on each token alone, so a prefix
tree is to it what separate rows are.

Placements (h is the output of the hooked module, x its input):

- `houlsby` (1902.00751): h + s U act(D h) after the attention and after the MLP, before the residual sum;
- `pfeiffer` (2005.00247): the same, after the MLP only;
- `parallel` (2110.04366): h + s U act(D x) beside the MLP.

A family that norms a sub-layer's output (Gemma 3) norms the adapted output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.nn import functional as F

from luthier import contracts, registry
from luthier.adapt import folder as files
from luthier.adapt.blocks import Block, blocks
from luthier.errors import CheckpointError, Fault, SpecError

ENGINE = "BOTTLENECK"
NAME = "bottleneck"  # the child's name in the module that it serves
PREFIX = "base_model.model."  # what PEFT's tensor names begin with
SHARED = PREFIX + NAME + "_kronecker"
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Shape(BaseModel):
    """What decides an adapter but its values; also what its folder says, and then checked as a stranger's word."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    placement: Literal["houlsby", "pfeiffer", "parallel"]
    size: int = Field(ge=1, le=16_384)
    activation: Literal["relu", "gelu", "silu", "tanh"]
    scale: float = Field(gt=0, le=1000, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    layers: list[int] | None = Field(None, min_length=1, max_length=4096)  # blocks by number; None: all
    terms: int = Field(0, ge=0, le=64)  # Kronecker products that a projection is the sum of; 0: a plain matrix
    rank: int = Field(1, ge=1, le=64)  # of each product's large factor


class Dense(nn.Module):
    """x (..., inputs) -> x W' + b (..., outputs)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the matrix."""
        return F.linear(x, self.weight, self.bias)


class Kronecker(nn.Module):
    """A linear layer whose matrix is the sum over i of A_i (n, n) kron (L_i R_i); all layers share the A (2106.04647).

    `shared` is (n, n, n), `left` (n, outputs / n, rank), `right` (n, rank, inputs / n).
    """

    def __init__(self, shared: nn.Parameter, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.shared, self.bias = shared, nn.Parameter(bias)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    def weight(self) -> torch.Tensor:
        """The whole matrix (outputs, inputs)."""
        large = self.left @ self.right
        spread = torch.einsum("ipq,iab->paqb", self.shared, large)
        return spread.reshape(len(self.bias), -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the matrix; building it costs as much as n tokens."""
        return F.linear(x, self.weight(), self.bias)


class Bottleneck(nn.Module):
    """s U act(D x): down to a few channels, a non-linearity, up again; joined to the hooked module's output."""

    def __init__(self, down: nn.Module, up: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.dropout = nn.Dropout(shape.dropout)
        self.activation, self.scale = shape.activation, shape.scale
        self.reads_input = shape.placement == "parallel"
        self.active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The update before its scale, (..., hidden)."""
        update: torch.Tensor = self.up(self.dropout(ACTIVATIONS[self.activation](self.down(x))))
        return update

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What torch calls after the module's forward; None leaves the output as it is."""
        if not self.active:
            return None
        states, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        x = states
        if self.reads_input:
            x = args[0] if args else kwargs["hidden_states"]
        joined = torch.add(states, self(x), alpha=self.scale)
        return joined if rest is None else (joined, *rest)


@dataclass(frozen=True)
class _Site:
    """A module that an adapter is hung on."""

    name: str
    module: nn.Module


class BesideAdapted(contracts.Adapted):
    """A base with one small module per site, not yet on it until `install`."""

    def __init__(self, model: Any, shape: Shape, seed: int) -> None:
        """Draw the modules; a shape that this model cannot carry is a SpecError, and the model is as it was."""
        self.model, self.shape = model, shape
        self._sites = _sites(model, shape)
        self._modules = _drawn(model, shape, self._sites, seed)
        self._handles: list[Any] = []

    def install(self) -> BesideAdapted:
        """Freeze the base and hang the modules on it."""
        self.model.requires_grad_(False)
        for site, module in zip(self._sites, self._modules, strict=True):
            module.train(site.module.training)
            module.requires_grad_(True)
            site.module.add_module(NAME, module)
            self._handles.append(site.module.register_forward_hook(module.hook, with_kwargs=True))
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters by the names of the file: <prefix><module>.bottleneck.{down,up}.{weight,bias,left,right}."""
        found = {}
        for site, module in zip(self._sites, self._modules, strict=True):
            for name, parameter in module.named_parameters():
                shared = name.endswith(".shared")
                found[SHARED if shared else f"{PREFIX}{site.name}.{NAME}.{name}"] = parameter
        return found

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the bare base."""
        before = [module.active for module in self._modules]
        for module in self._modules:
            module.active = False
        try:
            yield
        finally:
            for module, active in zip(self._modules, before, strict=True):
                module.active = active

    def save(self, folder: Path) -> None:
        """Write the adapter's two files; tensors are float32, as PEFT's are."""
        config = files.own_config(ENGINE, self.model, **self.shape.model_dump())
        files.write(folder, config, {name: parameter.float() for name, parameter in self.trainable().items()})

    def merge(self) -> NoReturn:
        """Refuse: the non-linearity has no place in the base's matrices."""
        raise SpecError(
            "a bottleneck adapter cannot be merged: a matrix of the base cannot hold its non-linear layer",
            remedy="serve the adapter beside its base, or train lora where a merged model is needed",
        )

    def detach(self) -> Any:
        """Take hooks and modules off and return the plain base, unchanged."""
        for handle in self._handles:
            handle.remove()
        for site in self._sites:
            if NAME in site.module._modules:
                delattr(site.module, NAME)
        self._handles.clear()
        return self.model


def attach(model: Any, shape: Shape, *, seed: int) -> BesideAdapted:
    """Put a fresh adapter on a model. U starts at zero, so that it changes nothing; D is drawn from `seed` alone.

    SpecError, with all faults, where the model has no such layers or cannot be cut into the Kronecker factors.
    """
    return BesideAdapted(model, shape, seed).install()


def load(model: Any, folder: Path) -> BesideAdapted:
    """Put a saved adapter on a model; CheckpointError, and the model as it was, unless every tensor fits."""
    shape = read_shape(folder)
    try:
        adapted = BesideAdapted(model, shape, seed=0)
    except SpecError as error:
        faults = error.faults or [Fault(error.where, error.what, error.remedy)]
        raise CheckpointError("the adapter does not fit this base", where=str(folder), faults=faults) from error
    tensors = files.read_tensors(folder / files.WEIGHTS)
    parameters = adapted.trainable()
    files.require_fit(folder, tensors, {name: tuple(p.shape) for name, p in parameters.items()})
    odd = [Fault(name, f"is {t.dtype}, not float") for name, t in tensors.items() if not t.dtype.is_floating_point]
    if odd:
        raise CheckpointError("tensors of a wrong kind", where=str(folder / files.WEIGHTS), faults=odd)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return adapted.install()


def read_shape(folder: Path) -> Shape:
    """Read an untrusted configuration; CheckpointError with every setting that is missing, unknown or out of range."""
    written = files.read_own_config(folder, ENGINE, set(Shape.model_fields))
    try:
        return Shape(**{key: value for key, value in written.items() if key in Shape.model_fields})
    except ValidationError as error:
        faults = registry.faults_of(error, "", Shape.model_fields)
        place = str(folder / files.CONFIG)
        raise CheckpointError("the adapter's configuration is refused", where=place, faults=faults) from error


def _sites(model: Any, shape: Shape) -> list[_Site]:
    """The modules that get an adapter, in the order of the blocks; SpecError with all faults."""
    found = blocks(model)
    faults = _layer_faults(shape.layers, len(found)) + _cut_faults(shape, _hidden(model))
    if faults:
        raise SpecError("this bottleneck does not fit the model", faults=faults)
    wanted = range(len(found)) if shape.layers is None else sorted(layer % len(found) for layer in shape.layers)
    sites = [_Site(*part) for index in wanted for part in _parts(found[index], shape)]
    if any(hasattr(site.module, NAME) for site in sites):
        raise SpecError("the model carries a bottleneck already", remedy="detach it first")
    return sites


def _parts(block: Block, shape: Shape) -> list[tuple[str, nn.Module]]:
    return [block.attention, block.mlp] if shape.placement == "houlsby" else [block.mlp]


def _layer_faults(layers: list[int] | None, count: int) -> list[Fault]:
    faults = [
        Fault("layers", f"{layer} is not a layer of this model", f"it has {count}: 0 to {count - 1}, or -1 for the top")
        for layer in layers or ()
        if not -count <= layer < count
    ]
    if not faults and layers and len({layer % count for layer in layers}) < len(layers):
        faults.append(Fault("layers", "names a layer twice"))
    return faults


def _cut_faults(shape: Shape, hidden: int) -> list[Fault]:
    widths = {"size": shape.size, "the model's hidden size": hidden}
    return [
        Fault("n", f"{shape.terms} does not divide {what} {width}", "choose a common divisor of both")
        for what, width in widths.items()
        if shape.terms and width % shape.terms
    ]


def _hidden(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _drawn(model: Any, shape: Shape, sites: list[_Site], seed: int) -> list[Bottleneck]:
    """Fresh modules in the base's dtype and on its devices; drawn on the CPU, so that they are the same on any."""
    draw = torch.Generator().manual_seed(seed)
    shared = None
    if shape.terms:
        first = torch.randn(shape.terms, shape.terms, shape.terms, generator=draw) * shape.terms**-0.5
        shared = nn.Parameter(first.to(next(sites[0].module.parameters()).device, model.dtype))
    made = []
    for site in sites:
        down = _projection(_hidden(model), shape.size, shape, shared, draw)
        up = _projection(shape.size, _hidden(model), shape, shared, draw, zero=True)
        module = Bottleneck(down, up, shape)
        made.append(module.to(next(site.module.parameters()).device, model.dtype))
    return made


def _projection(
    inputs: int, outputs: int, shape: Shape, shared: nn.Parameter | None, draw: torch.Generator, zero: bool = False
) -> nn.Module:
    """A projection whose entries have variance 1 / (3 inputs), as LoRA's A; or a zero one whose values can learn."""
    bias = torch.zeros(outputs)
    if shared is None:
        bound = 0.0 if zero else inputs**-0.5
        return Dense(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=draw), bias)
    terms, rank = shape.terms, shape.rank
    left = torch.empty(terms, outputs // terms, rank).normal_(0.0, rank**-0.5, generator=draw)
    right = torch.empty(terms, rank, inputs // terms).normal_(0.0, (3 * inputs) ** -0.5, generator=draw)
    return Kronecker(shared, left, torch.zeros_like(right) if zero else right, bias)
