"""`luthier study methods task.yaml`: which way of tuning suits this task? One page; its parts do the work.

Every method gets a search for its learning rate with equally many trials inside its own bracket, then full-length runs
from several seeds, then one look at the test rows. Nothing is paid for twice: a killed study goes on where it stood.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier import registry, store
from luthier import spec as specs
from luthier.errors import TrainingError, UsageError
from luthier.evaluate import study_page, study_report
from luthier.flows import calibrate, closing, pools, trials
from luthier.flows import train as flow
from luthier.flows.allotment import Allotment, given_up, plan_in_words, runs_in_words
from luthier.flows.events import Listener, Note, Stage, silent
from luthier.flows.judge import Judge
from luthier.flows.pools import Pool, Result
from luthier.flows.searching import Methods, count, loss_of, search_all, search_told
from luthier.flows.study_screen import print_study
from luthier.flows.trials import WORTH_SAVING, Bench, Trial
from luthier.spec import RunSpec
from luthier.training import budget as budgets
from luthier.training.budget import Cost, Shape
from luthier.training.search import Found

__all__ = ["print_study", "seconds_of", "study_methods"]
FALLBACKS = 2  # lower rates that are tried where one diverges over the full length
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}


def study_methods(
    spec: RunSpec,
    *,
    methods: Sequence[str | Mapping[str, Any]],
    budget: float | None = None,
    seeds: int = 3,
    top: int = 4,
    limit: int | None = None,
    ray: str | None = None,
    on_event: Listener | None = None,
) -> dict[str, Any]:
    """Compare methods on a task and return what `study.json` holds; it lies in `runs/<name>-methods/`.

    `budget` is in seconds, `seeds` are the runs of the `top` best methods (the others get one), `limit` the test rows
    that are judged, `ray` a cluster's address or `local`. Raises SpecError with every fault of the methods at once,
    UsageError where the budget is too short for any fair study.
    """
    tell = on_event or silent
    if ray is not None:
        pools.require_ray()
    asked = trials.resolve(spec, methods)
    if limit is not None:
        spec = spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"limit": limit})})
    run = store.Run(Path(spec.runs) / f"{spec.name}-methods")
    request = {"task": spec.model_dump(mode="json"), "methods": asked, "seeds": seeds, "top": top, "ray": bool(ray)}
    with run.lock(), _marked(run):
        clock = Allotment(run.folder / "plan.json", request, budget, tell)
        bench = Bench.open(spec, run.folder, tell)
        store.write_text(run.folder / "task.yaml", specs.dump(spec))
        judge = flow.judge_of(run, spec, bench.prepared, bench.identity)
        judge.check()
        with pools.opened(bench, ray) as pool:
            study = Study(bench, judge, clock, pool, asked, seeds, top, tell)
            study.measure()
            study.plan()
            study.search()
            study.plan_runs()
            study.run()
        tell(Stage("test", f"{len(judge.examples)} rows, once"))
        known = closing.closing(bench, judge, study.finals, tell)
        report = study_report.build(
            facts={**study.facts(), "ray": bool(ray), "ledger": {"opened": flow.openings(run)}},
            methods={label: study.about(label) for label in asked},
            known=known,
            scorer=judge.scorers[spec.evaluate.primary],
        )
        store.write_json(run.folder / "study.json", report)
        study_page.write_page(report, run.folder / "study.html")
        run.update(sentence=report["sentence"])
        return report


def seconds_of(text: str) -> float:
    """`45m`, `2h`, `90s` or `1h30m` in seconds; UsageError for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[smh])", text.strip().lower())
    if not parts or "".join(number + unit for number, unit in parts) != re.sub(r"\s", "", text.lower()):
        raise UsageError(f"'{text}' is not a time", where="--budget", remedy="write 45m, 2h or 1h30m")
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if total <= 0:
        raise UsageError("no time is left to work in", where="--budget", remedy="write 45m, 2h or 1h30m")
    return total


class Study:
    """A study on its way: each step fills in what the next one needs."""

    def __init__(
        self, bench: Bench, judge: Judge, clock: Allotment, pool: Pool, asked: Methods, seeds: int, top: int,
        tell: Listener,
    ) -> None:  # fmt: skip
        self.bench, self.judge, self.clock, self.pool, self.tell = bench, judge, clock, pool, tell
        self.asked, self.seeds, self.top = asked, seeds, top
        self.measured: dict[str, calibrate.Measured] = {}
        self.costs: dict[str, Cost] = {}  # of the methods that can be used, and are still in the race
        self.found: dict[str, Found] = {}
        self.finals: dict[str, list[Result]] = {}

    def measure(self) -> None:
        """What a step of each method takes, and answering the test rows; kept, so that a resumed study plans alike."""
        told = self.clock.measured()
        if told is None:
            timed = {
                label: calibrate.method(self.bench, label, one, self.tell) for label, one in self.asked.items()
            }  # fmt: skip
            calibrate.refuse_empty(timed)
            usable = {label: self.asked[label] for label, one in timed.items() if one.cost}
            memory = calibrate.memories(self.bench, usable, self.clock.seconds, self.tell)
            timed |= {label: replace(timed[label], memory=peak) for label, peak in memory.items()}
            told = timed, calibrate.closing(self.bench, self.judge)
            self.clock.keep_measured(*told)
        self.measured, self.after = told
        self.costs = {label: one.cost for label, one in self.measured.items() if one.cost}
        if not any(self.measured[label].memory for label in self.costs):
            self.clock.say("Peak memory is not told: measuring it would have taken too much of the budget.")

    def plan(self) -> None:
        """Choose what is done, and tell of it."""
        self.shape = self._fitted("shape")
        many = len(self.costs)
        runs = many + (self.shape.seeds - 1) * min(self.top, many)
        self.clock.total = count(self.shape, many) + runs
        self.tell(Note(plan_in_words(self.shape, many, self.clock.left(), self.clock.seconds)))

    def search(self) -> None:
        """Every method's rate; without a search its own default. What steps really took corrects the costs."""
        usable = {label: self.asked[label] for label in self.costs}
        if self.shape.rates == 1:
            made = {label: registry.make("methods", dict(one), "methods") for label, one in usable.items()}
            self.found = {label: Found(one.learning_rate, math.nan, ()) for label, one in made.items()}
            return
        self.tell(Stage("search the learning rates", f"{len(usable)} methods, {self.shape.rates} rates each"))
        self.found, tried = search_all(
            usable, self.shape, self.costs, self.bench.spec.train.seed, self.pool, self.clock, self.tell
        )
        for label, results in tried.items():
            seen = [one["step_seconds"] for one in results if one["status"] == "complete"]
            if seen:
                self.costs[label] = replace(self.costs[label], step=statistics.median(seen))
        self.costs = {label: cost for label, cost in self.costs.items() if self.found[label].rate is not None}
        if not self.costs:
            raise TrainingError("every trial of every method diverged", remedy="look at the rows: luthier show")

    def plan_runs(self) -> None:
        """Fit the full-length runs into what the searches have left: more or fewer than was planned at first."""
        before, self.shape = self.shape, self._fitted("finals", self.shape)
        if (self.shape.full, self.shape.seeds) != (before.full, before.seeds):
            self.tell(Note(f"after the searches: {runs_in_words(self.shape, len(self.costs))}"))
        for text in given_up(self.shape, self.bench.full, self.seeds):
            self.clock.say(text)

    def run(self) -> None:
        """Full-length runs at the chosen rates: one of each method, then further seeds of the best by dev loss."""
        self.tell(Stage("full-length runs", f"{len(self.costs)} methods, {self.shape.full} steps"))
        rates = {label: self.found[label].rate or 0.0 for label in self.costs}
        self._round(rates, 0)
        for _ in range(FALLBACKS):
            lower = {label: rate for label in rates if self._diverged(label) and (rate := self._lower(label))}
            self._round(lower, 0)
            rates |= lower
        whole = [label for label in rates if not self._diverged(label)]
        if not whole:
            raise TrainingError("every full-length run diverged", remedy="look at the rows: luthier show")
        best = sorted(whole, key=lambda label: loss_of(self.finals[label][-1]))[: self.top]
        test = budgets.closing(self.shape, len(self.costs), self.after)
        for more in range(1, self.shape.seeds):
            again = {label: rates[label] for label in best}
            if not self.clock.fits(test + sum(map(self._seconds, again)) / self.pool.width):
                self.clock.say(f"Runs took longer than planned: only {more} of {self.shape.seeds} seeds were run.")
                break
            self._round(again, more)

    def facts(self) -> dict[str, Any]:
        """What the report tells beside its numbers."""
        bench, spec = self.bench, self.bench.spec
        return {
            "name": spec.name,
            "created": flow.now(),
            "model": spec.model.name,
            "parameters": bench.weights,
            "metric": spec.evaluate.primary,
            "rows": {"train": len(bench.prepared.train), "dev": len(bench.dev)},
            "shape": self.shape.as_json(),
            "task_steps": bench.full,
            "asked_seeds": self.seeds,
            "budget": self.clock.seconds,
            "seconds": self.clock.spent,
            "said": self.clock.said,
            "provenance": {**bench.identity, "data": bench.prepared.data_hash},
            "seed": spec.evaluate.seed,
        }

    def about(self, label: str) -> dict[str, Any]:
        """One method: what it is, its search and its runs."""
        options, found, told = self.asked[label], self.found.get(label), self.measured[label]
        made = registry.make("methods", dict(options), "methods")
        fields = type(made.options).model_fields
        defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
        return {
            "method": dict(options),
            "asked": {key: value for key, value in options.items() if key == "name" or value != defaults.get(key)},
            "title": made.about.title,
            "family": made.about.family,
            "not_merged": made.not_merged,
            "bracket": list(made.bracket),
            "memory": told.memory,
            "why": told.why or ("" if found and found.rate else "every trial of its search diverged"),
            "search": None if found is None else search_told(found),
            "runs": [dict(result) for result in self.finals.get(label, ())],
        }

    def _fitted(self, key: str, searched: Shape | None = None) -> Shape:
        return self.clock.plan(
            key, self.bench.full, self.seeds, self.top, self.costs, self.after, looks_every=self.bench.looks_every,
            width=self.pool.width, searched=searched,
        )  # fmt: skip

    def _round(self, rates: Mapping[str, float], seed: int) -> None:
        """One full-length run of each of these methods."""
        first = self.bench.spec.train.seed
        asked = {
            label: Trial(
                self.asked[label], rate, first + seed, self.shape.full, True, self._seconds(label) > WORTH_SAVING
            )
            for label, rate in rates.items()
        }
        for label, result in self.pool.run(asked, self.tell):
            self.finals.setdefault(label, []).append(result)
            self.clock.did(f"{label}, full length, seed {first + seed}", self._seconds(label), result["seconds"])

    def _seconds(self, label: str) -> float:
        return budgets.trial(self.costs[label], self.shape.full, math.ceil(self.shape.full / self.bench.looks_every))

    def _diverged(self, label: str) -> bool:
        return bool(self.finals[label][-1]["status"] == "diverged")

    def _lower(self, label: str) -> float | None:
        """The best rate of a search's last rung that is lower than the one which diverged over the full length."""
        failed = self.finals[label][-1]["trial"]["rate"]
        curve, longest = self.found[label].curve, self.shape.lengths[-1] if self.shape.lengths else 0
        done = [
            (loss, rate) for rate, steps, loss in curve if steps == longest and rate < failed and math.isfinite(loss)
        ]
        if not done:
            return None
        rate = min(done)[1]
        self.clock.say(f"{label} diverged over the full length at {failed:.2g} and ran at {rate:.2g} instead.")
        return rate


class _marked:
    """The study's record says how it stands: running, complete, or where it was stopped."""

    def __init__(self, run: store.Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._run.update(name=self._run.name, status="running", began=flow.now())

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        stopped = kind is not None and issubclass(kind, TrainingError | KeyboardInterrupt)
        status = "complete" if kind is None else "interrupted" if stopped else "failed"
        self._run.update(status=status, ended=flow.now())
