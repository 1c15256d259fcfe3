"""Prefix trees through FlexAttention: on CUDA, blocks of tokens of which none sees the other cost nothing.

The kernel is compiled once for any length (`dynamic`): packs differ in length, and a kernel for each would be compiled
for seconds and then given up at eight. Lengths are padded to whole blocks, which masks and kernels are made of.
Not measured: no figure of a GPU stands in docs/benchmarks.md yet.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch.nn import functional as F

BLOCK = 128  # tokens on a side of FlexAttention's blocks
LEAST_CAPABILITY = (7, 5)  # of a CUDA device, for Triton's kernels


def usable(device: torch.device) -> bool:
    """Whether FlexAttention runs forward and backward here: on CUDA with Triton (torch 2.13 has no CPU backward)."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def block_mask(seen_until: torch.Tensor, positions: torch.Tensor, window: int | None) -> Any:
    """FlexAttention's mask of a tree: token q sees k iff k <= q < seen_until[k], within a window of positions.

    `seen_until` and `positions` are (tokens,); tokens that pad to whole blocks see only such tokens.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    padding = -len(positions) % BLOCK
    size = len(positions) + padding
    until, places = F.pad(seen_until, (0, padding), value=size), F.pad(positions, (0, padding))

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        near = (key <= query) & (query < until[key])
        return near if window is None else near & (places[query] - places[key] < window)

    return create_block_mask(sees, None, None, size, size, device=str(positions.device), BLOCK_SIZE=BLOCK)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Any, scale: float) -> torch.Tensor:
    """q (1, heads, tokens, size), k and v (1, key-value heads, tokens, size) -> (1, heads, tokens, size)."""
    tokens, padding = query.shape[2], -query.shape[2] % BLOCK
    padded = (F.pad(states, (0, 0, 0, padding)) for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    mixed: torch.Tensor = _kernel(query.device.type)(*padded, block_mask=blocks, scale=scale, enable_gqa=grouped)
    return mixed[:, :, :tokens]


@functools.cache
def _kernel(device: str) -> Any:
    """The compiled kernel; on a CPU, where tests compare its forward pass, the plain function."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
