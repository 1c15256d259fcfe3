"""The largest magnitudes over many tensors, exactly, without holding or sorting them all.

A float32's magnitude orders as its bits do, so two counts of 65,536 bins find the bits of the last one that is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Part = Callable[[int], torch.Tensor]
HALF = 16


def largest(part: Part, parts: int, count: int) -> list[torch.Tensor]:
    """Flat ascending positions, tensor by tensor, of the `count` largest magnitudes over all of them.

    `part(i)` gives the i-th tensor, float32, and is asked for it three times. Of equals the first ones are taken; not
    a number counts as larger than all.
    """
    high, before = _bin(part, parts, count, lambda bits: bits >> HALF)
    low, before = _bin(part, parts, count, lambda bits: bits[bits >> HALF == high] & 0xFFFF, before)
    last = (high << HALF) + low
    spare = count - before  # how many of those that equal the last one are taken
    chosen = []
    for index in range(parts):
        bits = _bits(part(index))
        take, equal = bits > last, bits == last
        if spare < int(equal.sum()):
            equal &= equal.cumsum(0) <= spare
        spare -= int(equal.sum())
        chosen.append((take | equal).nonzero()[:, 0])
    return chosen


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().abs().reshape(-1).view(torch.int32)


def _bin(
    part: Part, parts: int, count: int, key: Callable[[torch.Tensor], torch.Tensor], before: int = 0
) -> tuple[int, int]:
    """The bin in which the `count`-th largest lies, and how many lie in higher ones; `before` were counted already."""
    totals = sum(torch.bincount(key(_bits(part(index))), minlength=1 << HALF).cpu() for index in range(parts))
    assert isinstance(totals, torch.Tensor), "there are parts"
    above = before + totals.flip(0).cumsum(0).flip(0)  # in this bin or a higher one
    found = int((above >= count).nonzero()[-1])
    return found, int(above[found] - totals[found])
