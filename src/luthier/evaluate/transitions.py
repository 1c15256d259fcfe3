"""Which items tuning fixed and which it broke; kept ones are right before and after, stuck ones wrong both times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.contracts import Scorer
from luthier.records import Prediction, Score

CELLS = ("broken", "stuck", "fixed", "kept")  # worst news first
FULL = 1 - 1e-9
GRADED = 0.5  # graded metrics without a notion of a right record count as right from here

Item = dict[str, Any]


@dataclass(frozen=True)
class Transitions:
    """Counts and items of the four cells, and the rule by which an answer is right."""

    counts: dict[str, int]
    items: dict[str, list[Item]]
    rule: str
    unscored: int


def transitions(base: Sequence[Prediction], tuned: Sequence[Prediction], metric: str, scorer: Scorer) -> Transitions:
    """Sort the items of two systems (same order) into cells by one metric."""
    threshold, rule = right_from(scorer, [item.scores[metric] for item in (*base, *tuned)])
    items: dict[str, list[Item]] = {name: [] for name in CELLS}
    unscored = 0
    for one, other in zip(base, tuned, strict=True):
        before, after = one.scores[metric], other.scores[metric]
        if before.value is None or after.value is None:
            unscored += 1
            continue
        cell = _cell(right(before, threshold), right(after, threshold))
        items[cell].append(_item(one, other, metric, cell))
    return Transitions({name: len(items[name]) for name in CELLS}, items, rule, unscored)


def transitions_by_field(
    base: Sequence[Prediction], tuned: Sequence[Prediction], metric: str
) -> dict[str, dict[str, int]]:
    """The same four counts for every gold field of a record metric."""
    counts: dict[str, dict[str, int]] = {}
    for one, other in zip(base, tuned, strict=True):
        before, after = (item.scores[metric].parts.get("fields", {}) for item in (one, other))
        for path in (path for path in before if path in after and "invented" not in (before[path], after[path])):
            cells = counts.setdefault(field_name(path), dict.fromkeys(CELLS, 0))
            cells[_cell(before[path] == "match", after[path] == "match")] += 1
    return counts


def right_from(scorer: Scorer, scores: Sequence[Score]) -> tuple[float, str]:
    """From which value an answer counts as right, and the sentence that says so."""
    if any("exact" in score.parts for score in scores):
        return FULL, "an answer is right when every field is right and none is invented"
    if scorer.binary:
        return FULL, "an answer is right when it matches the gold answer"
    return GRADED, f"an answer counts as right from a score of {GRADED:g}"


def right(score: Score, threshold: float) -> bool:
    """Whether a scored answer is right; a record metric says so itself in `parts.exact`."""
    if "exact" in score.parts:
        return bool(score.parts["exact"])
    return score.value is not None and score.value >= threshold


def field_name(path: str) -> str:
    """The field that a path belongs to: places in lists do not matter."""
    return re.sub(r"\[\d+\]", "[]", path)


def worst(found: Transitions, limit: int = 20) -> list[Item]:
    """What the tuned model still gets wrong: broken ones first, then by score."""
    wrong = [*found.items["broken"], *found.items["stuck"]]
    return sorted(wrong, key=lambda item: (item["cell"] != "broken", item["scores"]["tuned"] or 0.0))[:limit]


def _cell(before: bool, after: bool) -> str:
    return ("kept" if after else "broken") if before else ("fixed" if after else "stuck")


def _item(base: Prediction, tuned: Prediction, metric: str, cell: str) -> Item:
    scores = base.scores[metric], tuned.scores[metric]
    return {
        "example_id": tuned.example_id,
        "origin": tuned.origin,
        "cell": cell,
        "question": tuned.question,
        "gold": tuned.gold,
        "base": base.text,
        "tuned": tuned.text,
        "scores": {"base": scores[0].value, "tuned": scores[1].value},
        "fields": _fields(scores[0].parts, scores[1].parts),
    }


def _fields(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[Item]:
    """One line for each field of the gold or of either answer: values side by side with their tags."""
    sides = {"base": base, "tuned": tuned}
    paths = dict.fromkeys([*base.get("fields", ()), *tuned.get("fields", ())])
    gold = tuned.get("gold", {})
    lines = []
    for path in paths:
        line: Item = {"name": path, "gold": gold.get(path), "wanted": path in gold}
        for name, parts in sides.items():
            line[name] = parts.get("values", {}).get(path)
            line[f"{name}_tag"] = parts.get("fields", {}).get(path, "")
        lines.append(line)
    return lines
