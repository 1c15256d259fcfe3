"""Adapters that free the base's own parameters: whole models, layers, norms, biases, heads, embeddings.

A freed parameter stays where it is; its values are exchanged. The base's own tensors are kept aside, untouched, so that
`disabled()` is a swap of pointers and detaching is exact. One copy of the freed tensors is all the extra memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from luthier import contracts
from luthier.adapt import blocks
from luthier.adapt import folder as files
from luthier.adapt.folder import WEIGHTS
from luthier.errors import CheckpointError, Fault, SpecError, UsageError

ENGINE = "WEIGHTS"
SETTINGS = {"architecture", "names", "added", "untied"}
TYING = "tie_word_embeddings"


class FreedAdapted(contracts.Adapted):
    """A base with some of its parameters free to learn, biases added to it, or its head untied from the embedding."""

    def __init__(self, model: Any, names: Sequence[str], *, added: Sequence[str] = (), untied: bool = False) -> None:
        """Free the parameters `names`, add zero biases called `added`, and give the head a weight of its own.

        Raises SpecError, and leaves the base as it was, where a parameter cannot learn.
        """
        refuse_quantised(model, names)
        self.model = model
        self.names, self.added, self.untied = list(names), list(added), untied
        model.requires_grad_(False)
        self._tying = _untie(model) if untied else None
        self._biases = {name: _add_bias(model, name) for name in self.added}
        self._freed = {name: model.get_parameter(name) for name in self.names}
        self._aside = {name: parameter.data for name, parameter in self._freed.items()}
        for parameter in self._freed.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The freed and added parameters by the base's own names."""
        return {**self._freed, **self._biases}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes with the base's own values; nothing is copied."""
        self._swap()
        self._set_biases(on=False)
        try:
            yield
        finally:
            self._swap()
            self._set_biases(on=True)

    def saved_bytes(self) -> int:
        """The tensors as they are saved: in the dtype in which they computed."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.trainable().values())

    def save(self, folder: Path) -> None:
        """Write the new values and nothing else of the base."""
        config = files.own_config(
            ENGINE,
            self.model,
            architecture=type(self.model).__name__,
            names=sorted(self.names),
            added=sorted(self.added),
            untied=self.untied,
        )
        files.write(folder, config, self.trainable())

    def merge(self) -> Any:
        """Keep the new values for good, and let the configuration say what was added or untied.

        Raises UsageError where the architecture's configuration has no room for the added biases.
        """
        if self.added:
            _switch_on(self.model, self.added)
        self._aside.clear()
        return self.model.requires_grad_(False)

    def detach(self) -> Any:
        """Put the base's own tensors back, take added biases off and tie the head again."""
        self._swap()
        self._set_biases(on=False)
        if self._tying is not None:
            self._tying.undo(self.model)
        return self.model.requires_grad_(False)

    def _swap(self) -> None:
        for name, parameter in self._freed.items():
            parameter.data, self._aside[name] = self._aside[name], parameter.data

    def _set_biases(self, *, on: bool) -> None:
        for name, bias in self._biases.items():
            self.model.get_submodule(_holder(name)).bias = bias if on else None


def load(model: Any, folder: Path) -> FreedAdapted:
    """Put saved values on a base; CheckpointError for names, shapes or values that do not fit, all of them at once."""
    config = files.read_own_config(folder, ENGINE, SETTINGS)
    require_architecture(folder, config, model)
    names, added, untied = _settings(folder, config)
    shapes = _shapes(model, folder, names, added, untied)
    tensors = files.read_tensors(folder / WEIGHTS)
    files.require_fit(folder, tensors, shapes)
    faults = [Fault(name, "holds whole numbers") for name, t in tensors.items() if not t.is_floating_point()]
    if faults:
        raise CheckpointError(f"{folder}: does not fit this base", faults=faults)
    adapted = FreedAdapted(model, names, added=added, untied=untied)
    with torch.no_grad():
        for name, parameter in adapted.trainable().items():
            parameter.copy_(tensors[name])
    return adapted


def require_architecture(folder: Path, config: Mapping[str, Any], model: Any) -> None:
    """Raise CheckpointError where an adapter names another architecture: heads of two families may fit by shape."""
    wanted, found = config.get("architecture"), type(model).__name__
    if wanted != found:
        raise CheckpointError(
            f"was made for {wanted!r}, this base is a {found}", where=str(folder), remedy="load it on its own base"
        )


def refuse_quantised(model: Any, names: Sequence[str]) -> None:
    """Raise SpecError where a parameter is stored in a format that no gradient step can change."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    wrong = [name for name in names if name in stored and not stored[name].is_floating_point()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise SpecError(
            f"{wrong[0]}{more} is quantised and cannot be changed in place",
            where="method",
            remedy="take a method that leaves the matrices frozen (lora), or load the base unquantised",
        )


def _settings(folder: Path, config: dict[str, Any]) -> tuple[list[str], list[str], bool]:
    """The three settings, checked for type and duplicates."""
    names, added, untied = config.get("names"), config.get("added"), config.get("untied")
    faults = []
    for key, value in (("names", names), ("added", added)):
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            faults.append(Fault(key, "must be a list of names"))
    if not isinstance(untied, bool):
        faults.append(Fault("untied", "must be true or false"))
    if not faults:
        both = [*(names or []), *(added or [])]
        faults = [Fault(name, "is listed twice") for name in sorted({n for n in both if both.count(n) > 1})]
        faults += [] if both else [Fault("names", "is empty")]
    if faults:
        raise CheckpointError("the adapter's configuration is refused", where=str(folder), faults=faults)
    return list(names or []), list(added or []), bool(untied)


def _shapes(model: Any, folder: Path, names: list[str], added: list[str], untied: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the file must hold; CheckpointError for names that this base has no place for."""
    there = dict(model.named_parameters(remove_duplicate=untied is False))
    shapes = {name: tuple(there[name].shape) for name in names if name in there}
    faults = [Fault(name, "is no parameter of this base") for name in names if name not in there]
    for name in added:
        outputs = _outputs(model, name)
        if outputs is None:
            faults.append(Fault(name, "cannot be added: this base has no linear layer without a bias of that name"))
        else:
            shapes[name] = (outputs,)
    if untied and not blocks.tied(model):
        faults.append(Fault("untied", "this base's head is not tied to its embedding"))
    if faults:
        raise CheckpointError(f"{folder}: does not fit this base ({len(faults)} faults)", faults=faults[:20])
    return shapes


def _holder(name: str) -> str:
    return name.rpartition(".")[0]


def _outputs(model: Any, name: str) -> int | None:
    """The width of the linear that a bias of this name could be added to."""
    module = dict(model.named_modules()).get(_holder(name))
    fits = name.endswith(".bias") and isinstance(module, torch.nn.Linear) and module.bias is None
    return int(module.out_features) if fits and module is not None else None  # type: ignore[arg-type]


def _add_bias(model: Any, name: str) -> torch.nn.Parameter:
    """Give a linear a zero bias, in the dtype in which the model computes."""
    module: Any = model.get_submodule(_holder(name))
    dtype = module.weight.dtype if module.weight.is_floating_point() else model.dtype
    module.bias = torch.nn.Parameter(torch.zeros(module.out_features, dtype=dtype, device=module.weight.device))
    bias: torch.nn.Parameter = module.bias
    return bias


class _Tying:
    """What untying changed, to be undone."""

    def __init__(self, model: Any) -> None:
        self.weight: Any = blocks.embedding(model)[1].weight
        self.keys = dict(getattr(model, "all_tied_weights_keys", {}))
        self.said = [(config, getattr(config, TYING)) for config in _configs(model) if hasattr(config, TYING)]

    def undo(self, model: Any) -> None:
        blocks.head(model)[1].weight = self.weight
        model.all_tied_weights_keys = self.keys
        for config, value in self.said:
            setattr(config, TYING, value)


def _untie(model: Any) -> _Tying:
    """Give the head a parameter of its own over the embedding's values; the configuration says so from now on."""
    before = _Tying(model)
    name, module = blocks.head(model)
    module.weight = torch.nn.Parameter(before.weight.data, requires_grad=False)
    model.all_tied_weights_keys = {key: source for key, source in before.keys.items() if key != f"{name}.weight"}
    for config, _ in before.said:
        setattr(config, TYING, False)
    return before


def _configs(model: Any) -> list[Any]:
    own, text = model.config, model.config.get_text_config()
    return [own] if own is text else [own, text]


def _switch_on(model: Any, added: Sequence[str]) -> None:
    """Set the configuration's flags for the added biases, and fill in zeros where a flag brings more than was added."""
    flags = _flags_for(model, added)
    brought = {name for names in flags.values() for name in names}
    missing = sorted(set(added) - brought)
    if missing:
        kinds = sorted({_holder(name).rsplit(".", 1)[-1] for name in missing})
        raise UsageError(
            f"{type(model.config).__name__} has no setting for biases on {', '.join(kinds)}: a plain model folder "
            "cannot hold them",
            remedy="serve the adapter attached, or train with `linears` limited to layers that may have biases",
        )
    for flag in flags:
        setattr(model.config, flag, True)
    there = dict(model.named_parameters())
    for name in sorted(brought - there.keys()):
        _add_bias(model, name)


def _flags_for(model: Any, added: Sequence[str]) -> dict[str, set[str]]:
    """Switches of the configuration that bring some of these biases, each with every bias that it brings."""
    before = {name for name, _ in model.named_parameters()} - set(added)
    found = {}
    for flag in [key for key, value in model.config.to_dict().items() if value is False and "bias" in key]:
        config = type(model.config).from_dict({**model.config.to_dict(), flag: True})
        with torch.device("meta"):
            bare = type(model)(config)
        brought = {name for name, _ in bare.named_parameters() if name.endswith(".bias")} - before
        if brought & set(added):
            found[flag] = brought
    return found
