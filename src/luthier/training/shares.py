"""Who computes what: a step's packs dealt out by predicted cost, and cut so that several processes have enough.

A step lasts as long as its slowest process. Every function here is a pure one of the packs, so that all processes come
to the same answer without asking each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.records import Pack, Rendered
from luthier.text import pack as packing

HALVINGS = 6  # of the range in which the best pack size is sought: to a 64th of a step
WORTH = 0.98  # a step is cut smaller only where its slowest process gains this much
EVEN = 1.1  # the slowest's work over an even share, from which no better cut is sought: planning takes time as well


@dataclass(frozen=True)
class Cost:
    """What a training step's parts cost, in floating point operations; the defaults count tokens."""

    token: float = 1.0
    pair: float = 0.0  # of tokens that see each other, over all layers
    target: float = 0.0

    @classmethod
    def of(cls, model: Any) -> Cost:
        """The cost by a transformer's sizes: forward and input gradient, as most weights are frozen."""
        config = getattr(model, "config", None)
        if config is None:
            return cls()
        sizes = config.get_text_config()
        hidden, heads, layers = sizes.hidden_size, sizes.num_attention_heads, sizes.num_hidden_layers
        inner = getattr(sizes, "intermediate_size", None) or 4 * hidden
        inner = max(inner) if isinstance(inner, Sequence) else inner
        width = heads * (getattr(sizes, "head_dim", None) or hidden // heads)
        narrow = width * (getattr(sizes, "num_key_value_heads", None) or heads) // heads
        weights = hidden * (2 * width + 2 * narrow + 3 * inner)
        return cls(4.0 * layers * weights, 12.0 * layers * width, 4.0 * hidden * sizes.vocab_size)

    def __call__(self, pack: Pack) -> float:
        """Operations of one pack."""
        pairs = float((pack.positions + 1).sum()) if self.pair else 0.0
        return self.token * len(pack) + self.pair * pairs + self.target * len(pack.target_ids)


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """Places of the items of each of `count` processes: the longest first, each to whoever has least.

    The slowest has at most 4/3 of what the best deal would give it (Graham 1969).
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += costs[place]
    return [sorted(share) for share in shares]


def rounds(costs: Sequence[float], count: int) -> list[list[int]]:
    """The same where processes go in step, pass by pass: as many each as can be, and like costs in a round."""
    order = sorted(range(len(costs)), key=lambda place: (-costs[place], place))
    return [order[index::count] for index in range(count)]


def slowest(costs: Sequence[float], count: int, *, in_step: bool = False) -> float:
    """The cost of a step: of the process that has most, or of the dearest in every round."""
    if in_step:
        return math.fsum(sorted(costs, reverse=True)[::count])
    return max((math.fsum(costs[place] for place in share) for share in deal(costs, count)), default=0.0)


def planner(count: int, cost: Callable[[Pack], float], *, in_step: bool = False) -> Callable[..., list[Pack]]:
    """`text.pack.plan` for several processes: packs may come out smaller than the budget where that ends a step sooner.

    A shared prefix is computed again in each pack that it is cut into; losses and gradients stay those of the rows.
    """

    def plan(rows: Sequence[Rendered], *, budget: int, share: bool = True) -> list[Pack]:
        best = packing.plan(rows, budget=budget, share=share)
        if count == 1 or not best:
            return best
        least = slowest([cost(pack) for pack in best], count, in_step=in_step)
        for times in (1, 2):
            if least <= EVEN * math.fsum(map(cost, best)) / count:
                break
            tried = _in_parts(rows, times * count, best, budget=budget, share=share)
            time = slowest([cost(pack) for pack in tried], count, in_step=in_step)
            if time < WORTH * least:
                best, least = tried, time
        return best

    return plan


def _in_parts(
    rows: Sequence[Rendered], parts: int, whole: list[Pack], *, budget: int, share: bool
) -> list[Pack]:  # fmt: skip
    """The plan of at most so many packs whose largest is smallest, to within a step's 64th; `whole` where none is."""
    if len(whole) >= parts:
        return whole
    tokens, found = sum(map(len, whole)), whole
    low, high = tokens / (2 * parts), float(min(budget, tokens))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = packing.plan(rows, budget=math.ceil(middle), share=share)
        if len(tried) <= parts:
            found, high = tried, middle
        else:
            low = middle
    return found
