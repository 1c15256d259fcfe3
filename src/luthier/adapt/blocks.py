"""The parts of a transformer by their role, whatever the family calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from luthier.errors import SpecError


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
