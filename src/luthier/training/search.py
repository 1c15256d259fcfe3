"""The search for a learning rate by successive halving, as arithmetic: which trials to run, and which rate won.

Every trial of a rung starts afresh and runs the task's own schedule, warm-up and decay, over the rung's length. So each
dev loss is that of a finished run: a rate is judged after its decay, as it will be used, and a method that plans by the
run's length (pruning, masks that grow) sees a true one. Continued trials would save a third of the steps, but would
judge every rate in the middle of a schedule, where small rates look better than they are.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

WIDENINGS = 2  # rates tried beyond the edge of a bracket
LARGEST = 1.0  # no rate reaches it
LEAST_STEPS = 4  # of the shortest rung


@dataclass(frozen=True)
class Ask:
    """A trial that the search wants: a learning rate over so many steps."""

    rate: float
    steps: int


@dataclass(frozen=True)
class Found:
    """What a search came to. `curve` holds every (rate, steps, dev loss); `rate` is None where all trials diverged."""

    rate: float | None
    loss: float
    curve: tuple[tuple[float, int, float], ...]
    widened: tuple[float, ...] = ()  # rates beyond the bracket that were tried
    at_edge: bool = False  # the best rate is the outermost one tried: the optimum may lie beyond


Search = Generator[list[Ask], Mapping[Ask, float], Found]


def rates(bracket: tuple[float, float], count: int) -> list[float]:
    """Rates evenly spaced on a log scale over a bracket, both ends included, to two digits."""
    low, high = bracket
    if count == 1:
        return [_two_digits(math.sqrt(low * high))]
    return [_two_digits(low * (high / low) ** (place / (count - 1))) for place in range(count)]


def lengths(full: int, rungs: int) -> tuple[int, ...]:
    """Steps of each rung: the last is half of the full run, each one before half of the next; fewer in short runs."""
    halves = [max(min(LEAST_STEPS, full), math.ceil(full / 2**power)) for power in range(rungs, 0, -1)]
    return tuple(dict.fromkeys(halves))


def search(bracket: tuple[float, float], count: int, steps: Sequence[int]) -> Search:
    """Ask for a rung's trials, take their dev losses (inf: diverged), and keep the better half; return what was found.

    Where the outermost rate wins the last rung, rates beyond it are tried at that length, at most `WIDENINGS`.
    """
    alive = rates(bracket, count)
    curve: list[tuple[float, int, float]] = []
    for length in steps:
        losses = yield [Ask(rate, length) for rate in alive]
        curve += [(rate, length, losses[Ask(rate, length)]) for rate in alive]
        alive = survivors({rate: losses[Ask(rate, length)] for rate in alive})
    found = _best(curve) or (min(rate for rate, _, _ in curve), math.inf)
    widened: list[float] = []
    while len(widened) < WIDENINGS and (beyond := _beyond(found[0], curve, bracket, count)) is not None:
        losses = yield [Ask(beyond, steps[-1])]
        widened.append(beyond)
        curve.append((beyond, steps[-1], losses[Ask(beyond, steps[-1])]))
        if curve[-1][2] >= found[1] and math.isfinite(found[1]):
            break
        found = beyond, curve[-1][2]
    if not math.isfinite(found[1]):
        return Found(None, math.inf, tuple(curve), tuple(widened), True)
    tried = [rate for rate, _, _ in curve]
    return Found(*found, tuple(curve), tuple(widened), len(tried) > 1 and found[0] in (min(tried), max(tried)))


def survivors(losses: Mapping[float, float]) -> list[float]:
    """The better half of a rung (rounded up), without those that diverged, lowest rate first."""
    ranked = sorted((rate for rate in losses if math.isfinite(losses[rate])), key=lambda rate: (losses[rate], rate))
    return sorted(ranked[: math.ceil(len(losses) / 2)])


def _best(curve: Sequence[tuple[float, int, float]]) -> tuple[float, float] | None:
    """The best rate of the longest rung that any finished, below every rate that diverged; with its loss."""
    bound = min((rate for rate, _, loss in curve if not math.isfinite(loss)), default=math.inf)
    for length in sorted({steps for _, steps, _ in curve}, reverse=True):
        done = [(loss, rate) for rate, steps, loss in curve if steps == length and rate < bound]
        if done:
            return min(done)[1], min(done)[0]
    return None


def _beyond(
    chosen: float, curve: Sequence[tuple[float, int, float]], bracket: tuple[float, float], count: int
) -> float | None:
    """The next rate outward where the chosen one is the outermost tried; None inside the bracket."""
    tried = {rate for rate, _, _ in curve}
    if count < 2 or chosen not in (min(tried), max(tried)):
        return None
    ratio = (bracket[1] / bracket[0]) ** (1 / (count - 1))
    beyond = _two_digits(chosen / ratio if chosen == min(tried) else chosen * ratio)
    return beyond if beyond < LARGEST and beyond not in tried else None


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
