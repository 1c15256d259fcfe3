"""`luthier compare RUN_A RUN_B`: two tuned models on the test rows that both have answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier import registry, store
from luthier import spec as specs
from luthier.errors import UsageError
from luthier.evaluate import predict, wording
from luthier.evaluate import report as reports
from luthier.evaluate.transitions import transitions
from luthier.records import Prediction
from luthier.spec import EvaluateSpec


def compare(run_a: str | Path, run_b: str | Path) -> dict[str, Any]:
    """Compare the tuned models of two runs item by item; the first stands as `base`, the second as `tuned`.

    Only rows that both runs judged count, matched by content. Raises UsageError where there are none, or where the
    runs rest on different metrics.
    """
    runs = [store.open_run(run) for run in (run_a, run_b)]
    settings = [specs.load(run.spec).evaluate for run in runs]
    primary = _one_metric(settings)
    names = [primary, *(name for name in settings[0].also if name in settings[1].also and name != primary)]
    scorers = {name: registry.make("scorers", name) for name in names}
    answers = [{item.example_id: item for item in _answers(run)} for run in runs]
    both = [key for key in answers[0] if key in answers[1]]
    if not both:
        raise UsageError("the two runs have no test row in common", remedy="judge them on one test file (data.test)")
    first, second = (predict.score_all([side[key] for key in both], scorers) for side in answers)
    found, left_out = reports.compare_with(
        "base", {"base": first, "tuned": second}, scorers, primary, seed=settings[0].seed
    )
    cells = transitions(first, second, primary, scorers[primary])
    told = found[primary].as_json()
    sentence = f"From {runs[0].name} to {runs[1].name}: {wording.verdict(told)}; {wording.changes(cells.counts)}."
    return {
        "a": _about(runs[0], len(answers[0])),
        "b": _about(runs[1], len(answers[1])),
        "n": len(both),
        "primary": told,
        "metrics": {name: one.as_json() for name, one in found.items()},
        "unscored_metrics": left_out,
        "transitions": cells.counts,
        "sentence": sentence + _uncommon(len(both), [len(side) for side in answers]),
    }


def _one_metric(settings: list[EvaluateSpec]) -> str:
    first, second = (one.primary for one in settings)
    if first != second:
        raise UsageError(
            f"one run rests on {first}, the other on {second}", remedy="train them with one evaluate.primary"
        )
    return first


def _answers(run: store.Run) -> list[Prediction]:
    path = run.predictions / "test" / "tuned.jsonl"
    if not path.exists():
        raise UsageError(
            "has no answers of a tuned model yet", where=str(run.folder), remedy="finish it: luthier train"
        )
    return predict.load(path)


def _about(run: store.Run, items: int) -> dict[str, Any]:
    return {"name": run.name, "folder": str(run.folder), "items": items}


def _uncommon(both: int, items: list[int]) -> str:
    return "" if items == [both, both] else f" Only the {both} rows that both judged count ({items[0]} and {items[1]})."
