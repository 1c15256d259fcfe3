"""Field by field: how often each field of a record is right, before and after, with intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from luthier.evaluate.compare import paired
from luthier.evaluate.predict import clusters_of
from luthier.evaluate.transitions import field_name, transitions_by_field
from luthier.records import Prediction, Score

FIELD_DRAWS = 2000
TAGS = ("match", "mismatch", "omitted", "invented")
Rates = dict[str, Score]  # field -> share of its places that are right in one answer


def field_table(
    base: Sequence[Prediction], tuned: Sequence[Prediction], primary: str, *, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of every gold field for two systems, with the difference and its interval; empty without fields.

    No verdict is given for single fields: there are many, and intervals of many things cross zero by chance.
    """
    metric = _metric_with_fields(tuned, primary)
    if metric is None:
        return {}
    sides = [[_rates(item.scores[metric]) for item in side] for side in (base, tuned)]
    groups = clusters_of(tuned)
    moved = transitions_by_field(base, tuned, metric)
    tags = _tags(tuned, metric)
    table: dict[str, Any] = {}
    for name in dict.fromkeys(name for rates in sides[1] for name in rates):
        rows = [i for i, (one, other) in enumerate(zip(*sides, strict=True)) if name in one and name in other]
        scores = [[side[i][name] for i in rows] for side in sides]
        found = paired(
            scores[0], scores[1], [groups[i] for i in rows], binary=True, seed=seed, draws=FIELD_DRAWS, metric=name
        )
        keys = ("n", "base", "tuned", "difference", "low", "high", "base_interval", "tuned_interval")
        told = found.as_json()
        table[name] = {
            **{key: told[key] for key in keys},
            "tags": {tag: tags[name][tag] for tag in TAGS},
            "transitions": moved[name],
        }
    return table


def _metric_with_fields(predictions: Sequence[Prediction], primary: str) -> str | None:
    """The metric whose parts tell of fields: the primary one where it does."""
    names = dict.fromkeys([primary, *(name for item in predictions[:1] for name in item.scores)])
    return next((name for name in names if any("fields" in item.scores[name].parts for item in predictions)), None)


def _rates(score: Score) -> Rates:
    """Right or wrong for each gold field; a field in a list of records has the mean over its places."""
    right: dict[str, list[bool]] = defaultdict(list)
    for path, tag in score.parts.get("fields", {}).items():
        if tag != "invented":
            right[field_name(path)].append(tag == "match")
    return {name: Score(sum(found) / len(found)) for name, found in right.items()}


def _tags(predictions: Sequence[Prediction], metric: str) -> defaultdict[str, Counter[str]]:
    """How often each tag was given to each field."""
    tags: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in predictions:
        for path, tag in item.scores[metric].parts.get("fields", {}).items():
            tags[field_name(path)][tag] += 1
    return tags
