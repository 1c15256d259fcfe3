"""Which modules of a network a method tunes, found by role or by the names that model families give them."""

from __future__ import annotations

import math
from typing import Any

from luthier.adapt import blocks
from luthier.errors import SpecError

# Names of the layers whose outputs (keys, values) or inputs (down) are scaled by learned factors.
KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "query_key_value", "c_attn", "qkv_proj")
DOWN = ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "wo")


def factors(model: Any, outputs: list[str] | None, inputs: list[str] | None) -> tuple[list[str], list[str]]:
    """Names of layers whose outputs, and whose inputs, get factors; SpecError where none is named or found."""
    inner = [name for name, _ in model.named_modules() if name.count(".") > 1]  # inside blocks, not the head
    leaves = {name.rsplit(".", 1)[-1] for name in inner}
    outputs = outputs or [name for name in KEYS_VALUES if name in leaves]
    inputs = inputs or [name for name in DOWN if name in leaves]
    if not outputs or not inputs:
        raise SpecError(
            "no keys, values or feed-forward layers found by name",
            where="method.target_modules",
            remedy=f"name them; this model has: {', '.join(sorted(leaves))}",
        )
    return outputs, inputs


def norms(model: Any) -> list[str]:
    """Full names of all norms."""
    return [name for name, module in model.named_modules() if blocks.is_norm(module)]


def embeddings(model: Any) -> list[str]:
    """Full name of the table that token ids are looked up in."""
    table = model.get_input_embeddings()
    return [name for name, module in model.named_modules() if module is table]


def common_width(model: Any, wanted: int) -> int:
    """The largest number up to `wanted` that divides the widths of all linear layers inside the blocks."""
    head = model.get_output_embeddings()
    widths = [
        width
        for module in model.modules()
        if blocks.is_linear(module) and module is not head
        for width in _widths(module)
    ]
    shared = math.gcd(*widths) if widths else wanted
    return max(n for n in range(1, min(wanted, shared) + 1) if shared % n == 0)


def _widths(module: Any) -> tuple[int, int]:
    """Inputs and outputs; GPT-2's transposed layers tell them only by their weight, quantised ones only by name."""
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else tuple(module.weight.shape)
