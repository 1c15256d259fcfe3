"""Sparse changes of the blocks' matrices: W + delta, where delta is zero but for a few entries.

A matrix's weight holds base plus change at all times and is written anew only after the change has moved, so a forward
pass costs what the base's costs, answers are computed by the base's own code, and no second copy of the weights is kept
for the backward pass. What autograd sees is the weight as a function of what learns (`Matrix.weight`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from luthier import contracts
from luthier.adapt import blocks
from luthier.adapt import folder as files
from luthier.adapt.folder import WEIGHTS
from luthier.adapt.freed import refuse_quantised, require_architecture
from luthier.errors import CheckpointError, Fault, SpecError

ENGINE = "SPARSE"
SETTINGS = {"architecture", "matrices"}
INDEX, VALUES = ".index", ".values"
BYTES = 8  # an entry as it is saved: int32 and float32
LARGEST = 2**31 - 1  # entries of a matrix that an int32 can count


class Matrix(ABC):
    """One linear layer whose weight is the base's plus a change."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module  # the weight's full name, the layer that holds it

    @abstractmethod
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by name."""

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The layer's weight as autograd sees it: a function of what learns."""

    @abstractmethod
    def restore(self) -> None:
        """Put the base's own values back, bit for bit."""


class DeltaAdapted(contracts.Adapted):
    """A base with a change on some of its matrices."""

    def __init__(self, model: Any, matrices: Sequence[Matrix]) -> None:
        self.model, self.matrices = model, list(matrices)
        model.requires_grad_(False)
        self._parameters = {name: p for matrix in self.matrices for name, p in matrix.parameters().items()}
        self._written: object = None  # what the weights were last written from
        self._on = False
        # All ways into the model, generation and packs included, lead through its body.
        self._hook = model.get_decoder().register_forward_pre_hook(lambda *_: self.refresh())
        self._patch()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by the matrix's name and its part."""
        return self._parameters

    @abstractmethod
    def sparse(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The change that is saved: flat positions, ascending int64, and float32 values, by matrix."""

    @abstractmethod
    def write(self) -> None:
        """Write base plus change into the weights."""

    def standing(self) -> object:
        """What the weights depend on; they are written anew when it has changed."""
        return tuple(parameter._version for parameter in self._parameters.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the weights up to date with what was learnt."""
        if self._on and self.model.device.type != "meta" and (now := self.standing()) != self._written:
            self.write()
            self._written = now

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the weights are the base's own."""
        self._unpatch()
        self._restore()
        try:
            yield
        finally:
            self._patch()

    def save(self, folder: Path) -> None:
        """Write positions and values of each changed matrix."""
        found = self.sparse()
        config = files.own_config(
            ENGINE,
            self.model,
            architecture=type(self.model).__name__,
            matrices={name: len(index) for name, (index, _) in sorted(found.items())},
        )
        tensors = {f"{name}{INDEX}": index.to(torch.int32) for name, (index, _) in found.items()}
        tensors.update({f"{name}{VALUES}": values for name, (_, values) in found.items()})
        files.write(folder, config, tensors)

    def merge(self) -> Any:
        """Leave base plus change in the weights for good."""
        self.refresh()
        self._unpatch()
        self._hook.remove()
        return self.model.requires_grad_(False)

    def detach(self) -> Any:
        """Put the base's own weights and code back."""
        self._unpatch()
        self._restore()
        self._hook.remove()
        return self.model.requires_grad_(False)

    def _restore(self) -> None:
        for matrix in self.matrices:
            matrix.restore()

    def _patch(self) -> None:
        self._on, self._written = True, None
        for matrix in self.matrices:
            matrix.module.forward = partial(_forward, matrix)

    def _unpatch(self) -> None:
        self._on = False
        for matrix in self.matrices:
            del matrix.module.forward


def _forward(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """The layer's own product, with the weight as a function of what learns where gradients are wanted."""
    module = matrix.module
    if not torch.is_grad_enabled():
        plain: torch.Tensor = type(module).forward(module, x)
        return plain
    weight = matrix.weight()
    if isinstance(module, torch.nn.Linear):
        return F.linear(x, weight, module.bias)
    return torch.addmm(module.bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)  # Conv1D, transposed


class Entries(Matrix):
    """Chosen entries of a matrix, each with a learnt difference."""

    def __init__(self, name: str, module: Any, index: torch.Tensor) -> None:
        super().__init__(name, module)
        self.index = index.to(module.weight.device, torch.int64)  # (entries,) flat positions
        self.own = module.weight.data.view(-1)[self.index]  # the base's values there
        self.values = torch.nn.Parameter(torch.zeros(len(index), device=self.index.device))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {f"{self.name}{VALUES}": self.values}

    def weight(self) -> torch.Tensor:
        return _Chosen.apply(self.module.weight, self.values, self.index)  # type: ignore[no-any-return]

    def write(self) -> None:
        self.module.weight.data.view(-1)[self.index] = added(self.own, self.values)

    def restore(self) -> None:
        self.module.weight.data.view(-1)[self.index] = self.own


def added(own: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Base plus change, summed in float32 and rounded once to the base's dtype: the same bits wherever it is done."""
    return (own.float() + change).to(own.dtype)


class _Chosen(torch.autograd.Function):
    """The weight as it stands; its gradient goes to the chosen entries' values."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return None, grads[0].reshape(-1)[index].float(), None


class SparseAdapted(DeltaAdapted):
    """A base with fixed entries free to change."""

    matrices: list[Entries]  # type: ignore[assignment]

    def saved_bytes(self) -> int:
        """A position and a value for each entry."""
        return BYTES * sum(len(matrix.index) for matrix in self.matrices)

    def sparse(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """All chosen entries, those that have not moved included."""
        return {matrix.name: (matrix.index, matrix.values.detach()) for matrix in self.matrices}

    def write(self) -> None:
        """Write the chosen entries."""
        for matrix in self.matrices:
            matrix.write()

    def state(self) -> dict[str, torch.Tensor]:
        """The mask, which evidence of another machine might choose otherwise."""
        return {f"{matrix.name}{INDEX}": matrix.index.to("cpu", torch.int32) for matrix in self.matrices}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Choose the entries that were chosen before."""
        for matrix in self.matrices:
            matrix.restore()
            matrix.index.copy_(state[f"{matrix.name}{INDEX}"])
            matrix.own = matrix.module.weight.data.view(-1)[matrix.index]
        self._written = None


def candidates(model: Any, patterns: str | Sequence[str], where: str) -> dict[str, Any]:
    """The linears inside the blocks, by their weight's name; SpecError where patterns fit none or one is quantised."""
    found = {f"{name}.weight": m for block in blocks.blocks(model) for name, m in block.linears.items()}
    if not isinstance(patterns, str):
        found = {name: found[name] for name in blocks.choose(list(found), patterns, where)}
    if not found:
        raise SpecError("no linear layers were found in this model's blocks", where=where, remedy="use `layers`")
    refuse_quantised(model, list(found))
    return found


def attach_entries(model: Any, chosen: Mapping[str, torch.Tensor]) -> SparseAdapted:
    """Free the chosen flat positions of each matrix, by its weight's name."""
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in chosen}
    return SparseAdapted(model, [Entries(name, layers[name], index) for name, index in chosen.items() if len(index)])


def load(model: Any, folder: Path) -> SparseAdapted:
    """Put a saved sparse change on a base; CheckpointError for what does not fit: names, counts, positions, values."""
    config = files.read_own_config(folder, ENGINE, SETTINGS)
    require_architecture(folder, config, model)
    layers = candidates(model, "all-linear", "method")
    counts = _counts(folder, config.get("matrices"), layers)
    tensors = files.read_tensors(folder / WEIGHTS)
    expected = {f"{name}{part}": (count,) for name, count in counts.items() for part in (INDEX, VALUES)}
    files.require_fit(folder, tensors, expected)
    faults = [fault for name in counts for fault in _misplaced(name, tensors, layers[name].weight.numel())]
    if faults:
        raise CheckpointError(f"{folder}: does not fit this base ({len(faults)} faults)", faults=faults[:20])
    adapted = attach_entries(model, {name: tensors[f"{name}{INDEX}"] for name in counts})
    with torch.no_grad():
        for matrix in adapted.matrices:
            matrix.values.copy_(tensors[f"{matrix.name}{VALUES}"])
    return adapted


def _counts(folder: Path, matrices: Any, layers: Mapping[str, Any]) -> dict[str, int]:
    """How many entries of each matrix the configuration announces."""
    if not isinstance(matrices, dict) or not matrices:
        raise CheckpointError("names no matrices", where=str(folder / files.CONFIG))
    faults = [Fault(str(name), "is no matrix of this base's blocks") for name in matrices if name not in layers]
    for name in matrices.keys() & layers.keys():
        most = layers[name].weight.numel()
        if type(matrices[name]) is not int or not 0 < matrices[name] <= most:
            faults.append(Fault(name, f"announces {matrices[name]!r} entries, the matrix has {most}"))
    if faults:
        raise CheckpointError(f"{folder}: does not fit this base ({len(faults)} faults)", faults=faults[:20])
    return dict(matrices)


def _misplaced(name: str, tensors: Mapping[str, torch.Tensor], size: int) -> Iterator[Fault]:
    """What is wrong with a matrix's positions and values."""
    index, values = tensors[f"{name}{INDEX}"], tensors[f"{name}{VALUES}"]
    if index.dtype != torch.int32:
        yield Fault(f"{name}{INDEX}", "does not hold 32-bit positions")
    elif int(index.min()) < 0 or int(index.max()) >= size:
        yield Fault(f"{name}{INDEX}", f"holds positions outside 0-{size - 1}")
    elif bool((index[1:] <= index[:-1]).any()):
        yield Fault(f"{name}{INDEX}", "holds positions twice or out of order")
    if values.dtype != torch.float32:
        yield Fault(f"{name}{VALUES}", "does not hold 32-bit numbers")
