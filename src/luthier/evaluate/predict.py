"""Predictions: answers paired with their items, kept on disk, scored. Scoring again costs no tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier import store
from luthier.contracts import Scorer
from luthier.errors import Fault, UsageError
from luthier.records import Completion, Example, Prediction, Score

ONE = 1 - 1e-6  # rounding that score(gold, gold) may have
CHECKED = 200  # gold answers that the self-check looks at


def pair(examples: Sequence[Example], completions: Iterable[Completion]) -> list[Prediction]:
    """Join items with one system's answers, in order; every item must have one."""
    return [
        Prediction(
            example_id=example.id,
            question=example.question,
            gold=example.answer,
            text=completion.text,
            stop=completion.stop,
            origin=str(example.origin),
            lineage=example.lineage,
            tags=dict(example.tags),
        )
        for example, completion in zip(examples, completions, strict=True)
    ]


def score_all(
    predictions: Iterable[Prediction], scorers: Mapping[str, Scorer], examples: Iterable[Example] = ()
) -> list[Prediction]:
    """Judge every answer with every scorer; a value that is not a number becomes UNSCORED."""
    by_id = {example.id: example for example in examples}
    return [
        dataclasses.replace(
            item, scores={name: _score(scorer, item, by_id.get(item.example_id)) for name, scorer in scorers.items()}
        )
        for item in predictions
    ]


def self_check(scorers: Mapping[str, Scorer], golds: Sequence[str]) -> dict[str, float | None]:
    """Prove each metric on this data: score(gold, gold) must be 1; return the level that mixed-up answers reach.

    Raises UsageError, with the first bad answers of every metric, where a metric does not fit the answers.
    """
    picked = [golds[int(index)] for index in np.random.default_rng(0).permutation(len(golds))[:CHECKED]]
    faults: list[Fault] = []
    chance: dict[str, float | None] = {}
    for name, scorer in scorers.items():
        found = _misfits(name, scorer, picked)
        faults += found
        if not found:
            mixed = [scorer.score(picked[i - 1], gold) for i, gold in enumerate(picked)] if len(picked) > 1 else []
            chance[name] = scorer.aggregate(mixed)
    if faults:
        remedy = "choose a metric that fits the answers under `evaluate`"
        raise UsageError("a metric cannot judge these answers", faults=faults, remedy=remedy)
    return chance


def clusters_of(predictions: Sequence[Prediction]) -> list[str]:
    """Name every item's independent group: items that share a lineage root, directly or through others, share it."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    heads = []
    for item in predictions:
        roots = item.lineage or (item.example_id,)
        for other in roots[1:]:
            parent[root(other)] = root(roots[0])
        heads.append(roots[0])
    return [root(head) for head in heads]


def save(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write predictions as JSON lines, atomically."""
    store.write_jsonl(path, [dataclasses.asdict(item) for item in predictions])


def load(path: Path) -> list[Prediction]:
    """Read what `save` wrote."""
    return [_from_json(value) for value in store.read_jsonl(path)]


def _score(scorer: Scorer, item: Prediction, example: Example | None) -> Score:
    score = scorer.score(item.text, item.gold, example)
    if score.value is not None and not math.isfinite(score.value):
        return Score(None, f"the scorer returned {score.value}", score.parts)
    return score


def _misfits(name: str, scorer: Scorer, golds: Sequence[str]) -> list[Fault]:
    """Why a metric cannot judge these answers: some gold is not its own equal, or none can be scored."""
    scores = [(gold, scorer.score(gold, gold)) for gold in golds]
    scored = [(gold, score.value) for gold, score in scores if score.value is not None]
    wrong = [(gold, value) for gold, value in scored if value < ONE]
    if wrong:
        gold, value = wrong[0]
        return [Fault(name, f"gives {value:.3f} to a gold answer judged by itself ({len(wrong)} such): {gold[:80]!r}")]
    if golds and not scored:
        return [Fault(name, f"leaves every answer unscored: {scores[0][1].reason}", f"such as {golds[0][:80]!r}")]
    return []


def _from_json(value: dict[str, Any]) -> Prediction:
    scores = {name: Score(**score) for name, score in value["scores"].items()}
    return Prediction(**{**value, "lineage": tuple(value["lineage"]), "scores": scores})
