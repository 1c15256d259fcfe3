"""Rows to sides: near duplicates and shared lineage stay together, and no row ever moves.

The side of a cluster is a hash of its anchor (its first row in the file) and the seed, so rows that are added change
nothing for the others. With the sides of an earlier split (`previous`), old rows keep theirs whatever is added; a new
row that is near old rows of different sides is on no side: it is quarantined and listed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data import near, runs
from luthier.data.leaks import Leak, guard, without_leaks
from luthier.records import Example

__all__ = ["Leak", "Split", "guard", "split", "without_leaks"]

TRAIN, DEV, TEST, QUARANTINED = "train", "dev", "test", "quarantined"
SIDES = (TRAIN, DEV, TEST)


@dataclass(frozen=True)
class Split:
    """Where each row went. `clusters` labels the rows, in the order they were given, by their cluster's anchor id."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    quarantined: list[Example] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For split.json: every row's side by its content hash; `sides` is what `previous` takes."""
        parts = {TRAIN: self.train, DEV: self.dev, TEST: self.test, QUARANTINED: self.quarantined}
        return {
            "counts": {side: len(rows) for side, rows in parts.items()},
            "clusters": len(set(self.clusters)),
            "sides": {row.id: side for side, rows in parts.items() for row in rows},
            "quarantined": [str(row.origin) for row in self.quarantined],
        }


def split(
    examples: Sequence[Example],
    *,
    dev: float,
    test: float,
    seed: int,
    previous: Mapping[str, str] | None = None,
    threshold: float = near.THRESHOLD,
) -> Split:
    """Split by shares of the rows; `previous` maps example ids to their sides in an earlier split."""
    rows = _Rows(examples, threshold)
    groups = rows.clusters()
    old = previous or {}

    def draw(anchor: int) -> str:
        return _drawn(examples[anchor], dev, test, seed)

    sides: dict[int, str] = {}
    for members in _by_label(groups).values():
        kept = {index: old[examples[index].id] for index in members if examples[index].id in old}
        sides |= _sides_of(members, kept, rows, draw)
    parts: dict[str, list[Example]] = {side: [] for side in (*SIDES, QUARANTINED)}
    for index, example in enumerate(examples):
        parts[sides[index]].append(example)
    labels = [examples[group].id for group in groups]
    return Split(parts[TRAIN], parts[DEV], parts[TEST], parts[QUARANTINED], labels)


class _Rows:
    """Examples and the ties between them: all that would make one of them give another away (`leaks`).

    A near question, a shared root, the same answer in prose, a long run of words, a question inside another.
    """

    def __init__(self, examples: Sequence[Example], threshold: float) -> None:
        self.threshold = threshold
        self.texts = near.questions(examples)
        self.marks: list[set[str]] = [{f"root {root}" for root in (row.id, *row.lineage)} for row in examples]
        for index, answer in near.telling_answers(examples).items():
            self.marks[index].add(f"answer {answer}")
        shared = runs.shared(self.texts)
        for index, found in enumerate(shared.long):
            self.marks[index].update(f"run {run}" for run in found)
        for cover in shared.covers:
            for index in (cover.outer, cover.inner):
                self.marks[index].add(f"cover {cover.outer} {cover.inner}")

    def clusters(self) -> list[int]:
        """Label rows that hang together by any chain of ties with the index of the first of them."""
        forest = near.Forest(len(self.texts))
        for index, label in enumerate(near.clusters(self.texts, self.threshold)):
            forest.join(label, index)
        first: dict[str, int] = {}
        for index, marks in enumerate(self.marks):
            for mark in marks:
                forest.join(first.setdefault(mark, index), index)
        return [forest.root(index) for index in range(len(self.texts))]

    def ties(self, members: Sequence[int]) -> dict[int, set[int]]:
        """For each of some rows, those of them that it is tied to directly."""
        found: dict[int, set[int]] = {index: set() for index in members}
        texts = [self.texts[index] for index in members]
        for pair in near.pairs(texts, texts, self.threshold):
            found[members[pair.left]].add(members[pair.right])
        holders: dict[str, set[int]] = defaultdict(set)
        for index in members:
            for mark in self.marks[index]:
                holders[mark].add(index)
        for group in holders.values():
            for index in group:
                found[index] |= group
        return found


def _sides_of(
    members: Sequence[int], kept: Mapping[int, str], rows: _Rows, draw: Callable[[int], str]
) -> dict[int, str]:
    """Sides of one cluster's rows: the old ones keep theirs, new ones follow them, or the draw of their first row."""
    told = set(kept.values()) - {QUARANTINED}
    if len(told) > 1:
        return _between(members, kept, rows.ties(members), draw)
    fresh = [index for index in members if index not in kept]
    side = told.pop() if told else draw(fresh[0]) if fresh else ""
    return {**dict.fromkeys(fresh, side), **kept}


def _between(
    members: Sequence[int], kept: Mapping[int, str], ties: Mapping[int, set[int]], draw: Callable[[int], str]
) -> dict[int, str]:
    """Sides in a cluster whose old rows are on several: a new row follows its neighbours, or is quarantined.

    New rows are placed one by one, those with a placed neighbour first; a quarantined row ties nothing.
    """
    sides = dict(kept)
    waiting = [index for index in members if index not in kept]
    while waiting:
        touched = {index: {sides[other] for other in ties[index] if sides.get(other) in SIDES} for index in waiting}
        index = next((index for index in waiting if touched[index]), waiting[0])
        found = sorted(touched[index])
        sides[index] = QUARANTINED if len(found) > 1 else found[0] if found else draw(index)
        waiting.remove(index)
    return sides


def _drawn(anchor: Example, dev: float, test: float, seed: int) -> str:
    """The side that an anchor's content and the seed decide."""
    digest = hashlib.sha256(f"{seed}/{anchor.lineage[0]}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return TEST if place < test else DEV if place < test + dev else TRAIN


def _by_label(labels: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        found[label].append(index)
    return found
