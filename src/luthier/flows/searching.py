"""Learning-rate searches of several methods at once, rung by rung, on whatever pool there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from luthier import registry
from luthier.flows.allotment import Allotment
from luthier.flows.events import Listener
from luthier.flows.pools import Pool, Result
from luthier.flows.trials import WORTH_SAVING, Trial
from luthier.training import budget, search
from luthier.training.budget import Cost, Shape
from luthier.training.search import Ask, Found

Methods = Mapping[str, Mapping[str, Any]]  # label -> name and options


def search_all(
    methods: Methods, shape: Shape, costs: Mapping[str, Cost], seed: int, pool: Pool, clock: Allotment, tell: Listener
) -> tuple[dict[str, Found], dict[str, list[Result]]]:
    """Search the rate of every method with equally many trials; also every method's trials as they came."""
    brackets = {label: registry.make("methods", dict(options), "methods").bracket for label, options in methods.items()}
    searches = {label: search.search(brackets[label], shape.rates, shape.lengths) for label in methods}
    asks = {label: next(one) for label, one in searches.items()}
    found: dict[str, Found] = {}
    results: dict[str, list[Result]] = {label: [] for label in methods}
    rungs = 0
    while asks:
        rungs += 1
        clock.total += len(asks) if rungs > len(shape.lengths) else 0  # beyond a bracket: not foreseen
        trials = {
            (label, ask): _trial(methods[label], ask, seed, costs[label])
            for label, asked in asks.items()
            for ask in asked
        }
        losses: dict[str, dict[Ask, float]] = {label: {} for label in asks}
        for (label, ask), result in pool.run(trials, tell):
            losses[label][ask] = loss_of(result)
            results[label].append(result)
            planned = budget.trial(costs[label], ask.steps, budget.LOOKS)
            clock.did(f"{label} at {ask.rate:.2g}, {_told(result)}", planned, result.get("seconds", 0.0))
        for label in list(asks):
            try:
                asks[label] = searches[label].send(losses[label])
            except StopIteration as end:
                found[label] = end.value
                del asks[label]
    return {label: found[label] for label in methods}, results


def loss_of(result: Result) -> float:
    """A trial's best dev loss; infinite where it diverged."""
    loss = result["dev_loss"]
    return math.inf if loss is None else float(loss)


def count(shape: Shape, methods: int) -> int:
    """Trials of all searches, without those beyond a bracket."""
    alive, total = shape.rates, 0
    for _ in shape.lengths if shape.rates > 1 else ():
        total += alive
        alive = math.ceil(alive / 2)
    return total * methods


def search_told(found: Found) -> dict[str, Any]:
    """A search as JSON; a diverged trial has no loss."""

    def finite(loss: float) -> float | None:
        return loss if math.isfinite(loss) else None

    curve = [{"rate": rate, "steps": steps, "loss": finite(loss)} for rate, steps, loss in found.curve]
    loss = finite(found.loss)
    return {
        "rate": found.rate, "loss": loss, "curve": curve, "widened": list(found.widened), "at_edge": found.at_edge
    }  # fmt: skip


def _trial(method: Mapping[str, Any], ask: Ask, seed: int, cost: Cost) -> Trial:
    long = budget.trial(cost, ask.steps, budget.LOOKS) >= WORTH_SAVING
    return Trial(method, ask.rate, seed, ask.steps, saves=long)


def _told(result: Result) -> str:
    return "diverged" if result["dev_loss"] is None else f"dev loss {result['dev_loss']:.4f}"
