"""What a study of methods will cost, and the richest one that fits into a budget. Arithmetic on measured seconds.

What is given up when time is short, in this order: rates and rungs of the search, then seeds down to two, then the
length of the runs, then the second seed, and last the search itself. What was given up is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from luthier.training import search

LEAST_STEPS = 8  # of a full-length run, where the task has so many
SHARES = (1.0, 0.75, 0.5, 0.35)
SHORT_SHARES = (0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
LOOKS = 2  # dev losses of a search trial


@dataclass(frozen=True)
class Cost:
    """Measured seconds of one method: an optimiser step, a look at the dev rows, attaching and detaching."""

    step: float
    look: float
    start: float


@dataclass(frozen=True)
class Closing:
    """Measured seconds of what follows the training runs."""

    answers: float  # one system answers the test rows
    others: float  # speed and forgetting of one method


@dataclass(frozen=True)
class Shape:
    """What a study does: rates and rung lengths of each search, length and seeds of the full runs.

    One rate means that there is no search: each method runs at its own default.
    """

    rates: int
    lengths: tuple[int, ...]
    full: int
    seeds: int
    top: int  # methods that get all seeds; the others get one

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON; `of_json` is the inverse."""
        return {**asdict(self), "lengths": list(self.lengths)}

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Shape:
        """Read what `as_json` wrote."""
        return cls(**{**value, "lengths": tuple(value["lengths"])})


def shapes(full: int, seeds: int, top: int) -> Iterator[Shape]:
    """Shapes of a study whose runs have at most `full` steps, from the richest to the poorest."""
    least, two = min(full, LEAST_STEPS), min(2, seeds)
    rich = ((6, 3, seeds), (5, 2, seeds), (4, 2, seeds), (4, 2, two))
    ladder = [(share, *one) for share in SHARES for one in rich]
    ladder += [(share, *one) for share in SHORT_SHARES for one in ((4, 2, 1), (3, 1, 1))]
    ladder += [(share, 1, 0, 1) for share in SHORT_SHARES]
    for share, rates, rungs, repeats in ladder:
        steps = max(least, math.ceil(share * full))
        yield Shape(rates, search.lengths(steps, rungs), steps, repeats, top)


def trial(cost: Cost, steps: int, looks: int) -> float:
    """Seconds of one training run."""
    return cost.start + steps * cost.step + looks * cost.look


def searching(shape: Shape, cost: Cost) -> float:
    """Seconds of one method's search, with one rate beyond its bracket allowed for."""
    if shape.rates == 1:
        return 0.0
    alive, total = shape.rates, 0.0
    for length in shape.lengths:
        total += alive * trial(cost, length, LOOKS)
        alive = math.ceil(alive / 2)
    return total + trial(cost, shape.lengths[-1], LOOKS)


def running(shape: Shape, costs: Mapping[str, Cost], looks_every: int) -> float:
    """Seconds of all full-length runs; which methods will be the best is not known, so costs are averaged."""
    looks = math.ceil(shape.full / looks_every)
    once = sum(trial(cost, shape.full, looks) for cost in costs.values())
    again = (shape.seeds - 1) * min(shape.top, len(costs)) / len(costs)
    return once * (1 + again)


def closing(shape: Shape, methods: int, after: Closing) -> float:
    """Seconds of answering the test rows with every run and the base, and of measuring speed and forgetting."""
    runs = methods + (shape.seeds - 1) * min(shape.top, methods)
    return (runs + 1) * after.answers + methods * after.others


def forecast(
    shape: Shape, costs: Mapping[str, Cost], after: Closing, *, looks_every: int, width: int = 1, searched: bool = False
) -> float:
    """Seconds of a study, or of what remains of it once every method is `searched`, on `width` processes."""
    trials = running(shape, costs, looks_every)
    trials += 0.0 if searched else sum(searching(shape, cost) for cost in costs.values())
    return trials / width + closing(shape, len(costs), after)


def fit(
    room: float, full: int, seeds: int, top: int, costs: Mapping[str, Cost], after: Closing, *,
    looks_every: int, width: int = 1, search_as: Shape | None = None,
) -> Shape | None:  # fmt: skip
    """The richest shape that takes at most `room` seconds; None where not even the poorest does.

    `search_as` is the shape that the searches had, once they are over: only seeds and length can still change.
    """
    for shape in shapes(full, seeds, top):
        asked = shape
        if search_as is not None:
            asked = Shape(search_as.rates, search_as.lengths, shape.full, shape.seeds, shape.top)
        seconds = forecast(
            asked, costs, after, looks_every=looks_every, width=width, searched=search_as is not None
        )  # fmt: skip
        if seconds <= room:
            return asked
    return None


def least(full: int, costs: Mapping[str, Cost], after: Closing, *, looks_every: int, width: int = 1) -> float:
    """Seconds of the poorest study that still searches for each method's rate."""
    poorest = [shape for shape in shapes(full, 1, 1) if shape.rates > 1][-1]
    return forecast(poorest, costs, after, looks_every=looks_every, width=width)
