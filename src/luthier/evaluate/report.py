"""The report: all that a run found out, as one JSON-like dictionary. `page` draws it; nothing is decided there.

Scores and counts come from the test rows. Single items are shown from the dev rows (`browse`), so that reading about
errors does not wear the test out; `open_test` shows test items instead, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.contracts import Scorer
from luthier.errors import Fault, UsageError
from luthier.evaluate import wording
from luthier.evaluate.compare import Comparison, holm, paired
from luthier.evaluate.fields import field_table
from luthier.evaluate.guards import guards
from luthier.evaluate.history import sharing_of, training_of
from luthier.evaluate.predict import clusters_of
from luthier.evaluate.transitions import CELLS, Item, Transitions, transitions, worst
from luthier.records import Prediction

FORMAT = 1
LABELS = {"base": "base model", "base_few_shot": "base model with examples", "tuned": "tuned model"}
KEPT_ITEMS = {"broken": 60, "stuck": 60, "fixed": 30, "kept": 15}  # items of each cell that a report carries
SHARED_LENGTH = 40  # characters that all questions begin with before they are shown once

Systems = Mapping[str, Sequence[Prediction]]
Report = dict[str, Any]


def build(
    *,
    spec: Mapping[str, Any],
    facts: Mapping[str, Any],
    systems: Systems,
    scorers: Mapping[str, Scorer],
    steps: Sequence[Mapping[str, Any]] = (),
    checks: Mapping[str, Any] | None = None,
    browse: Systems | None = None,
    open_test: bool = False,
    labels: Mapping[str, str] | None = None,
    draws: int = 10_000,
) -> Report:
    """Compare the systems and gather what the report shows.

    `systems` holds scored predictions on the test rows under `base`, `tuned` and perhaps `base_few_shot`; `browse` the
    same on dev rows. `facts` may hold `name`, `created`, `seconds` (by system), `training` (the loop's outcome),
    `data`, `ledger` and `provenance`; they are shown as given. Raises UsageError when systems answered other items.
    """
    _same_items(systems)
    primary, seed = spec["evaluate"]["primary"], spec["evaluate"].get("seed", 0)
    base, left_out = compare_with("base", systems, scorers, primary, seed=seed, draws=draws)
    few: dict[str, Comparison] = {}
    if "base_few_shot" in systems:
        few, _ = compare_with("base_few_shot", systems, scorers, primary, seed=seed, draws=draws)
    found = transitions(systems["base"], systems["tuned"], primary, scorers[primary])
    report: Report = {
        "format": FORMAT,
        "name": facts.get("name", spec.get("name", "")),
        "created": facts.get("created", ""),
        "model": spec.get("model", {}).get("name", ""),
        "labels": {**LABELS, **(labels or {})},
        "sentence": "",
        "primary": _told(base[primary]),
        "primary_vs_few_shot": _told(few.get(primary)),
        "metrics": _with_holm(base, primary),
        "unscored_metrics": left_out,
        "systems": _systems(systems, browse or {}, base, few, facts.get("seconds", {})),
        "transitions": found.counts,
        "transitions_rule": found.rule,
        **_items(found, systems, browse, open_test, primary, scorers[primary]),
        "smallest_detectable_gain": base[primary].smallest_detectable_gain,
        "guards": guards(systems["tuned"], (browse or {}).get("tuned", ())),
        "fields": field_table(systems["base"], systems["tuned"], primary, seed=seed),
        "training": training_of(steps, facts.get("training", {})),
        "sharing": sharing_of(steps),
        "data": dict(facts.get("data", {})),
        "checks": dict(checks or {}),
        "ledger": {**facts.get("ledger", {}), "comparisons": len(base) + len(few)},
        "provenance": {
            **facts.get("provenance", {}),
            "metrics": {name: signature(one) for name, one in scorers.items()},
        },
    }
    report["sentence"] = sentence(report)
    return report


def sentence(report: Mapping[str, Any]) -> str:
    """The verdict in one or two plain sentences, with numbers and intervals."""
    text = f"{wording.verdict(report['primary'])}; {wording.changes(report['transitions'])}."
    few = report.get("primary_vs_few_shot")
    if few:
        low, high = wording.points(few["low"], sign=False), wording.points(few["high"], sign=False)
        text += (
            f" Against the {report['labels']['base_few_shot']} ({wording.percent(few['base'])}) the difference is "
            f"{wording.points(few['difference'])} points ({low} to {high})."
        )
    return text


def signature(scorer: Scorer) -> str:
    """A metric with the settings that decide its value."""
    own = getattr(scorer, "signature", None)
    if callable(own):
        return str(own())
    options = ", ".join(f"{key}={value}" for key, value in scorer.options.model_dump().items())
    return f"{scorer.name}({options})"


def compare_with(
    other: str, systems: Systems, scorers: Mapping[str, Scorer], primary: str, *, seed: int = 0, draws: int = 10_000
) -> tuple[dict[str, Comparison], dict[str, str]]:
    """Compare the tuned model with `other` by every metric, the primary first.

    A secondary metric that scores no item is left out, and the second result says why.
    """
    clusters = clusters_of(systems["tuned"])
    found: dict[str, Comparison] = {}
    left_out: dict[str, str] = {}
    for metric in [primary, *(name for name in scorers if name != primary)]:
        scorer = scorers[metric]
        sides = [[item.scores[metric] for item in systems[name]] for name in (other, "tuned")]
        try:
            found[metric] = paired(
                sides[0],
                sides[1],
                clusters,
                binary=scorer.binary,
                seed=seed,
                draws=draws,
                metric=metric,
                aggregate=None if type(scorer).aggregate is Scorer.aggregate else scorer.aggregate,
                higher_is_better=scorer.higher_is_better,
            )
        except UsageError as error:
            if metric == primary:
                raise
            left_out[metric] = error.what
    return found, left_out


def _told(found: Comparison | None) -> Report | None:
    """A comparison as JSON, with its sentence."""
    if found is None:
        return None
    told = found.as_json()
    return {**told, "sentence": wording.verdict(told)}


def _with_holm(found: Mapping[str, Comparison], primary: str) -> Report:
    """All metrics; the p-values of the secondary ones are adjusted for there being several."""
    adjusted = holm({name: one.p_value for name, one in found.items() if name != primary})
    return {name: {**(_told(one) or {}), "p_holm": adjusted.get(name, one.p_value)} for name, one in found.items()}


def _systems(
    systems: Systems,
    browse: Systems,
    with_base: Mapping[str, Comparison],
    with_few: Mapping[str, Comparison],
    seconds: Mapping[str, float],
) -> Report:
    """Every system's scores with intervals, its guards, and the seconds that it took to answer."""
    told: Report = {}
    for name in systems:
        found = with_few if name == "base_few_shot" else with_base
        side = "tuned" if name == "tuned" else "base"
        told[name] = {
            "scores": {
                metric: _score(getattr(one, side), getattr(one, f"{side}_interval")) for metric, one in found.items()
            },
            "guards": guards(systems[name], browse.get(name, ())),
            "seconds": seconds.get(name),
        }
    return told


def _score(value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {"value": value, "low": interval[0], "high": interval[1]}


def _items(
    found: Transitions, systems: Systems, browse: Systems | None, open_test: bool, primary: str, scorer: Scorer
) -> Report:
    """Single items for reading, the instruction that all of them begin with taken out and told once."""
    if open_test:
        shown, source, rows = found, "test", systems["tuned"]
    elif browse:
        _same_items(browse)
        shown, source, rows = transitions(browse["base"], browse["tuned"], primary, scorer), "dev", browse["tuned"]
    else:
        return {"items_from": "", "instruction": "", "transition_examples": {}, "worst": []}
    instruction = shared_beginning([item.question for item in rows])
    examples = {name: [_without(item, instruction) for item in shown.items[name][: KEPT_ITEMS[name]]] for name in CELLS}
    return {
        "items_from": source,
        "instruction": instruction,
        "transition_examples": examples,
        "worst": [_without(item, instruction) for item in worst(shown)],
    }


def _without(item: Item, instruction: str) -> Item:
    return {**item, "question": item["question"][len(instruction) :]}


def shared_beginning(questions: Sequence[str]) -> str:
    """The instruction that every question begins with, up to the end of a word; empty when there is none."""
    first, last = (min(questions), max(questions)) if len(questions) > 1 else ("", "")
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:length]
    while shared and not shared[-1].isspace():
        shared = shared[:-1]
    return shared if len(shared) >= SHARED_LENGTH and shared != first else ""


def _same_items(systems: Systems) -> None:
    """Raise UsageError unless all systems answered the same items in the same order."""
    wanted = [(item.example_id, item.gold) for item in systems["tuned"]]
    faults = [
        Fault(name, f"answered {len(items)} items, not the {len(wanted)} that the tuned model answered, or other ones")
        for name, items in systems.items()
        if [(item.example_id, item.gold) for item in items] != wanted
    ]
    if faults:
        raise UsageError(
            "systems must answer the same items in the same order", faults=faults, remedy="let them answer again"
        )
