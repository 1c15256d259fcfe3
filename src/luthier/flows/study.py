"""`luthier study methods task.yaml`: which way of tuning suits this task? One page; its parts do the work.

Every method gets a search for its learning rate with equally many trials inside its own bracket, then full-length runs
from several seeds, then one look at the test rows. Nothing is paid for twice: a killed study goes on where it stood.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
from luthier.training.budget import Closing, Cost, Shape
from luthier.training.search import Found

__all__ = ["print_study", "seconds_of", "study_methods"]
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
    with run.lock():
        bench = Bench.open(spec, run.folder, tell)
        store.write_text(run.folder / "task.yaml", specs.dump(spec))
        clock = Allotment(run.folder / "plan.json", request, budget, tell)
        judge = flow._judge(run, spec, bench.prepared, bench.identity)
        judge.check()
        with pools.opened(bench, ray) as pool, _marked(run):
            measured, after = _measure(bench, judge, asked, clock, tell)
            costs = {label: one.cost for label, one in measured.items() if one.cost}
            usable = {label: asked[label] for label in costs}
            shape = _plan(bench, clock, costs, after, seeds, top, pool, tell)
            tell(Stage("search the learning rates", f"{len(usable)} methods, {shape.rates} rates each"))
            found, tried = _searched(usable, shape, costs, spec.train.seed, pool, clock, tell)
            costs = _observed(costs, tried)
            shape = _replan(bench, clock, costs, after, seeds, top, pool, shape, found, tell)
            finals = _finals(bench, usable, found, shape, costs, after, pool, clock, tell)
        tell(Stage("test", f"{len(judge.examples)} rows, once"))
        known = closing.closing(bench, judge, finals, tell)
        report = study_report.build(
            facts=_facts(bench, spec, clock, shape, seeds, budget, bool(ray), flow.openings(run)),
            methods={
                label: _about(options, measured[label].memory, measured[label].why, found.get(label), finals.get(label))
                for label, options in asked.items()
            },
            known=known,
            scorer=judge.scorers[spec.evaluate.primary],
        )  # fmt: skip
        store.write_json(run.folder / "study.json", report)
        study_page.write_page(report, run.folder / "study.html")
        run.update(status="complete", ended=flow.now(), sentence=report["sentence"])
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


def _default(field: Any) -> Any:
    return None if field is None else field.get_default(call_default_factory=True)


class _marked:
    """The study's record says how it stands: running, complete, or where it was stopped."""

    def __init__(self, run: store.Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._run.update(name=self._run.name, status="running", began=flow.now())

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            stopped = issubclass(kind, TrainingError | KeyboardInterrupt)
            self._run.update(status="interrupted" if stopped else "failed")


def _measure(
    bench: Bench, judge: Judge, asked: Methods, clock: Allotment, tell: Listener
) -> tuple[dict[str, calibrate.Measured], Closing]:
    """What a step of each method takes, and answering the test rows; kept, so that a resumed study plans alike."""
    told = clock.measured()
    if told is None:
        methods = {label: calibrate.method(bench, label, options, tell) for label, options in asked.items()}
        calibrate.refuse_empty(methods)
        told = methods, calibrate.closing(bench, judge)
        clock.keep_measured(*told)
    return told


def _plan(
    bench: Bench, clock: Allotment, costs: Mapping[str, Cost], after: Closing, seeds: int, top: int, pool: Pool,
    tell: Listener,
) -> Shape:  # fmt: skip
    """Choose what is done, and tell of it."""
    shape = clock.plan(
        "shape", bench.full, seeds, top, costs, after, looks_every=bench.looks_every, width=pool.width
    )  # fmt: skip
    runs = len(costs) + (shape.seeds - 1) * min(top, len(costs))
    clock.total = count(shape, len(costs)) + runs
    tell(Note(plan_in_words(shape, len(costs), clock.left(), clock.seconds)))
    for text in given_up(shape, bench.full, seeds):
        clock.say(text)
    return shape


def _searched(
    usable: Methods, shape: Shape, costs: Mapping[str, Cost], seed: int, pool: Pool, clock: Allotment, tell: Listener
) -> tuple[dict[str, Found], dict[str, list[Result]]]:
    """Every method's rate; without a search each method's own default."""
    if shape.rates > 1:
        return search_all(usable, shape, costs, seed, pool, clock, tell)
    rates = {label: registry.make("methods", dict(one), "methods").learning_rate for label, one in usable.items()}
    return {label: Found(rate, math.nan, ()) for label, rate in rates.items()}, {label: [] for label in usable}


def _observed(costs: Mapping[str, Cost], tried: Mapping[str, Sequence[Result]]) -> dict[str, Cost]:
    """Costs with the seconds a step that the searches really had."""
    better = dict(costs)
    for label, results in tried.items():
        seen = sorted(one["step_seconds"] for one in results if one["status"] == "complete")
        if seen:
            better[label] = Cost(seen[len(seen) // 2], costs[label].look, costs[label].start)
    return better


def _replan(
    bench: Bench, clock: Allotment, costs: Mapping[str, Cost], after: Closing, seeds: int, top: int, pool: Pool,
    shape: Shape, found: Mapping[str, Found], tell: Listener,
) -> Shape:  # fmt: skip
    """Fit the full-length runs into what the searches have left; more seeds or steps than first planned if they fit."""
    alive = {label: cost for label, cost in costs.items() if found[label].rate is not None}
    if not alive:
        raise TrainingError("every trial of every method diverged", remedy="look at the rows: luthier show")
    settled = clock.plan(
        "finals", bench.full, seeds, top, alive, after, looks_every=bench.looks_every, width=pool.width, searched=shape
    )
    if (settled.full, settled.seeds) != (shape.full, shape.seeds):
        tell(Note(f"after the searches: {runs_in_words(settled, len(alive))}"))
        for text in given_up(settled, bench.full, seeds):
            clock.say(text)
    return settled


def _finals(
    bench: Bench, usable: Methods, found: Mapping[str, Found], shape: Shape, costs: Mapping[str, Cost], after: Closing,
    pool: Pool, clock: Allotment, tell: Listener,
) -> dict[str, list[Result]]:  # fmt: skip
    """Full-length runs at the chosen rates: one of each method, then further seeds of those with the best dev loss."""
    first, looks = bench.spec.train.seed, math.ceil(shape.full / bench.looks_every)
    alive = [label for label in usable if found[label].rate is not None]
    finals: dict[str, list[Result]] = {label: [] for label in alive}

    def run(labels: Sequence[str], seed: int) -> None:
        seconds = {label: budgets.trial(costs[label], shape.full, looks) for label in labels}
        asked = {
            label: Trial(usable[label], found[label].rate or 0.0, seed, shape.full, True, seconds[label] > WORTH_SAVING)
            for label in labels
        }
        for label, result in pool.run(asked, tell):
            finals[label].append(result)
            clock.did(f"{label}, full length, seed {seed}", seconds[label], result["seconds"])

    tell(Stage("full-length runs", f"{len(alive)} methods, {shape.full} steps"))
    run(alive, first)
    best = sorted(
        (label for label in alive if finals[label][0]["status"] == "complete"), key=lambda one: loss_of(finals[one][0])
    )
    if not best:
        raise TrainingError("every full-length run diverged", remedy="lower train.warmup's rates: see the searches")
    for more in range(1, shape.seeds):
        chosen = best[: shape.top]
        test = budgets.closing(shape, len(alive), after)
        longest = sum(budgets.trial(costs[label], shape.full, looks) for label in chosen) / pool.width
        if not clock.fits(longest + test):
            clock.say(f"The budget allowed {more} of {shape.seeds} seeds.")
            break
        run(chosen, first + more)
    return finals


def _facts(
    bench: Bench, spec: RunSpec, clock: Allotment, shape: Shape, seeds: int, budget: float | None, ray: bool,
    openings: int,
) -> dict[str, Any]:  # fmt: skip
    """What the report tells beside its numbers."""
    return {
        "name": spec.name,
        "created": flow.now(),
        "model": spec.model.name,
        "parameters": bench.weights,
        "metric": spec.evaluate.primary,
        "rows": {"train": len(bench.prepared.train), "dev": len(bench.dev), "test": 0},
        "shape": shape.as_json(),
        "task_steps": bench.full,
        "asked_seeds": seeds,
        "budget": budget,
        "seconds": clock.spent,
        "said": clock.said,
        "ray": ray,
        "ledger": {"opened": openings},
        "provenance": {**bench.identity, "data": bench.prepared.data_hash},
        "seed": spec.evaluate.seed,
    }


def _about(
    options: Mapping[str, Any], memory: int | None, why: str, found: Found | None, finals: Sequence[Result] | None
) -> dict[str, Any]:
    """One method before the test: what it is, its search and its runs."""
    made = registry.make("methods", dict(options), "methods")
    fields = type(made.options).model_fields
    return {
        "method": dict(options),
        "asked": {key: value for key, value in options.items() if key == "name" or value != _default(fields.get(key))},
        "title": made.about.title,
        "family": made.about.family,
        "not_merged": made.not_merged,
        "bracket": list(made.bracket),
        "memory": memory,
        "why": why or ("" if found is None or found.rate is not None else "every trial of its search diverged"),
        "search": None if found is None else search_told(found),
        "runs": [dict(result) for result in finals or ()],
    }
