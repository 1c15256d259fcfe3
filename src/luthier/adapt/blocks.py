"""The parts of a transformer by their role, whatever the family calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch

from luthier.errors import Fault, SpecError


@dataclass(frozen=True)
class Block:
    """One layer of the body. Names are full, as in `model.named_modules()`."""

    index: int
    name: str
    module: torch.nn.Module
    attention: tuple[str, torch.nn.Module]  # returns a tensor, or a tuple that begins with one
    mlp: tuple[str, torch.nn.Module]  # (tokens, hidden) -> (tokens, hidden)
    linears: dict[str, torch.nn.Module]  # by full name: attention's and the MLP's matrices
    norms: dict[str, torch.nn.Module]  # by full name


def blocks(model: Any) -> list[Block]:
    """Take a transformers decoder apart; SpecError names what was looked for where a part is missing."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else model
    names = {id(module): name for name, module in model.named_modules()}
    layers = next(
        (child for _, child in body.named_children() if isinstance(child, torch.nn.ModuleList) and len(child)), None
    )
    if layers is None:
        raise SpecError("no list of layers was found in this model", remedy="use a method that needs no blocks: lora")
    return [_block(index, names[id(layer)], layer) for index, layer in enumerate(layers)]


def _block(index: int, name: str, layer: torch.nn.Module) -> Block:
    return Block(
        index=index,
        name=name,
        module=layer,
        attention=_child(name, layer, ("attn", "attention")),
        mlp=_child(name, layer, ("mlp", "feed_forward", "ffn")),
        linears={f"{name}.{n}": m for n, m in layer.named_modules() if is_linear(m)},
        norms={f"{name}.{n}": m for n, m in layer.named_modules() if is_norm(m)},
    )


def is_linear(module: torch.nn.Module) -> bool:
    """A matrix product: torch's Linear, its quantised kin, or GPT-2's transposed Conv1D."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def is_norm(module: torch.nn.Module) -> bool:
    """LayerNorm or any of the RMSNorms: a module named so that holds a weight vector of its own."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.lower()
    return isinstance(weight, torch.Tensor) and weight.dim() == 1 and ("norm" in named)


def _child(name: str, layer: torch.nn.Module, wanted: tuple[str, ...]) -> tuple[str, torch.nn.Module]:
    """The child whose name ends in, or contains, one of `wanted` and that is no norm."""
    for child_name, child in layer.named_children():
        if any(word in child_name for word in wanted) and not is_norm(child) and any(True for _ in child.children()):
            return f"{name}.{child_name}", child
    raise SpecError(
        f"{name} has no part called {' or '.join(wanted)}", remedy="use a method that needs no blocks: lora"
    )


def outer_norms(model: Any) -> dict[str, torch.nn.Module]:
    """The norms that belong to no block, by full name: in most families the one before the head."""
    inside = {name for block in blocks(model) for name in block.norms}
    return {name: module for name, module in model.named_modules() if is_norm(module) and name not in inside}


def embedding(model: Any) -> tuple[str, torch.nn.Module]:
    """The token embedding by its full name."""
    return _named(model, model.get_input_embeddings(), "token embedding")


def head(model: Any) -> tuple[str, torch.nn.Module]:
    """The output head by its full name."""
    return _named(model, model.get_output_embeddings(), "output head")


def tied(model: Any) -> bool:
    """Whether the output head's weight is the token embedding's own parameter."""
    return head(model)[1].weight is embedding(model)[1].weight


def _named(model: Any, wanted: torch.nn.Module | None, what: str) -> tuple[str, torch.nn.Module]:
    for name, module in model.named_modules():
        if wanted is not None and module is wanted:
            return name, wanted
    raise SpecError(f"no {what} was found in this model", remedy="use a method that needs none: lora")


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name, or a part of the model that holds it, fits a shell-style pattern.

    `model.layers.0.mlp.up_proj.weight` fits `*.mlp.*`, `up_proj`, `mlp` and `model.layers.0`.
    """
    parts = name.split(".")
    holders = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(one, pattern) or fnmatchcase(one, f"*.{pattern}") for one in holders)


def choose(names: Sequence[str], patterns: Sequence[str], where: str) -> list[str]:
    """The names that fit any pattern, in their order; SpecError for patterns that fit none, with the nearest names."""
    faults = [
        Fault(f"{where}[{index}]", f"'{pattern}' fits nothing in this model", _nearest(pattern, names))
        for index, pattern in enumerate(patterns)
        if not any(matches(name, pattern) for name in names)
    ]
    if faults:
        raise SpecError(f"{where}: patterns that fit nothing", faults=faults)
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Names, and parts of names, that a mistyped pattern may have meant."""
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    near = get_close_matches(pattern.strip("*.").rsplit(".", 1)[-1], list(parts), n=3, cutoff=0.5)
    near += get_close_matches(pattern, list(names), n=2, cutoff=0.7)
    return f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(list(parts)[:20])}"
