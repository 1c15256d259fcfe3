"""A search over eight learning rates by successive halving against the full sweep: what it costs, what it finds.

    python bench/search.py demo/task.yaml --out docs/benchmarks/search.json

Cost is counted in optimiser steps (and given in seconds): the sweep trains every rate at full length, the search as
`luthier find-lr` does. The rate found is judged by its full-length run's dev loss against the sweep's best; noise is the
spread of the sweep's best rate over seeds. A killed run goes on where it stood: give it the same arguments again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier import registry
from luthier import spec as specs
from luthier.flows import trials
from luthier.flows.searching import loss_of
from luthier.flows.trials import Bench, Trial
from luthier.training import search
from luthier.training.search import Ask, Found

RUNGS = 3


class Runner:
    """Trials of one method on one bench, with their costs."""

    def __init__(self, bench: Bench, options: Mapping[str, Any], full: int) -> None:
        self.bench, self.options, self.full = bench, options, full
        self.seconds: dict[tuple[Ask, int], float] = {}

    def loss(self, ask: Ask, seed: int = 0) -> float:
        """The best dev loss of a rate over so many steps."""
        whole = ask.steps == self.full
        result = self.bench.run(Trial(self.options, ask.rate, seed, ask.steps, final=whole))
        self.seconds[ask, seed] = result["seconds"]
        print(
            f"{ask.rate:.2g}, {ask.steps} steps, seed {seed}: {loss_of(result):.4f}  {result['seconds']:.0f} s",
            flush=True,
        )
        return loss_of(result)


def halve(runner: Runner, bracket: tuple[float, float], count: int) -> tuple[Found, list[Ask]]:
    """Search as `find-lr` does; also every trial that it asked for."""
    asked: list[Ask] = []
    searching: Iterator[Any] = search.search(bracket, count, search.lengths(runner.full, RUNGS))
    wanted = next(searching)
    while True:
        asked += wanted
        try:
            wanted = searching.send({ask: runner.loss(ask) for ask in wanted})  # type: ignore[attr-defined]
        except StopIteration as end:
            return end.value, asked


def compare(runner: Runner, bracket: tuple[float, float], count: int, seeds: int) -> dict[str, Any]:
    """The search and the sweep, side by side."""
    found, asked = halve(runner, bracket, count)
    sweep = {rate: runner.loss(Ask(rate, runner.full)) for rate in search.rates(bracket, count)}
    best = min(sweep, key=lambda rate: sweep[rate])
    assert found.rate is not None, "every rate diverged"
    if found.rate not in sweep:  # found beyond the bracket
        sweep[found.rate] = runner.loss(Ask(found.rate, runner.full))
    again = [sweep[best], *(runner.loss(Ask(best, runner.full), seed) for seed in range(1, seeds))]
    noise = statistics.stdev(again) if seeds > 1 else math.nan
    gap = sweep[found.rate] - min(sweep.values())
    searched = sum(runner.seconds[ask, 0] for ask in asked)
    swept = [runner.seconds[Ask(rate, runner.full), 0] for rate in search.rates(bracket, count)]
    return {
        "full_steps": runner.full,
        "rates": count,
        "search": {"rate": found.rate, "widened": list(found.widened), "trials": len(asked)},
        "search_steps_in_full_runs": sum(ask.steps for ask in asked) / runner.full,
        "search_seconds_in_full_runs": searched / statistics.median(swept),
        "sweep": {f"{rate:.2g}": loss for rate, loss in sorted(sweep.items())},
        "best_rate": best,
        "loss_at_found": sweep[found.rate],
        "loss_at_best": min(sweep.values()),
        "gap": gap,
        "seeds_at_best": again,
        "noise": noise,
        "within_noise": gap <= 2 * noise,
        "curve": [list(one) for one in found.curve],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rates", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=None, help="of a full run")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the task, such as method.rank=8")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-search"))
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    overrides = [
        *asked.set,
        f"train.epochs={asked.epochs}",
        *([f"train.max_steps={asked.max_steps}"] * bool(asked.max_steps)),
    ]
    spec = specs.load(asked.task, overrides)
    bench = Bench.open(spec, asked.work)
    ((_, options),) = trials.resolve(spec, [spec.method["name"]]).items()
    bracket = registry.make("methods", options, "method").bracket
    result = {"task": str(asked.task), "method": options} | compare(
        Runner(bench, options, bench.full), bracket, asked.rates, asked.seeds
    )
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
