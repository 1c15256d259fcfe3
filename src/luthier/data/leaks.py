"""Training rows that give a held-out row away (data generation reference, section 5, steps 1 to 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data import near, runs
from luthier.records import Example

THRESHOLD = 0.8  # Jaccard index of character n-grams


@dataclass(frozen=True)
class Leak:
    """A training row and the held-out row it gives away. `kind`: same, near, run, covered or answer."""

    row: Example
    held: Example
    side: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        words = {
            "same": "asks the same as",
            "near": "is nearly the same as",
            "run": "shares a long run of words with",
            "covered": "holds most of",
            "answer": "has the same long answer as",
        }
        more = f" ({self.detail})" if self.detail else ""
        return f"{self.row.origin} {words[self.kind]} {self.side} row {self.held.origin}{more}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "train": str(self.row.origin),
            "held": str(self.held.origin),
            "side": self.side,
            "kind": self.kind,
            "detail": self.detail,
        }


def guard(
    train: Sequence[Example], dev: Sequence[Example], test: Sequence[Example], threshold: float = THRESHOLD
) -> list[Leak]:
    """List every training row that gives a dev or test row away, once, by its plainest kind; test rows first."""
    held = [*(("test", row) for row in test), *(("dev", row) for row in dev)]
    if not held or not train:
        return []
    rows = [*train, *(row for _, row in held)]
    texts = near.questions(rows)
    asked, kept = texts[: len(train)], texts[len(train) :]
    found: dict[int, Leak] = {}
    finders = (_same(asked, kept), _near(asked, kept, threshold), _runs(asked, kept), _answers(rows, len(train)))
    for place, target, kind, detail in (hit for finder in finders for hit in finder):
        side, row = held[target]
        found.setdefault(place, Leak(train[place], row, side, kind, detail))
    return [found[place] for place in sorted(found)]


def without_leaks(train: Sequence[Example], leaks: Sequence[Leak]) -> list[Example]:
    """The training rows that give nothing away. Held-out rows are never touched."""
    leaked = {id(leak.row) for leak in leaks}
    return [row for row in train if id(row) not in leaked]


Hit = tuple[int, int, str, str]  # training row, held-out row, kind, detail


def _same(asked: Sequence[str], kept: Sequence[str]) -> Iterator[Hit]:
    places: dict[str, int] = {}
    for place, text in enumerate(kept):
        places.setdefault(near.normal(text), place)
    for index, text in enumerate(asked):
        if near.normal(text) in places:
            yield index, places[near.normal(text)], "same", ""


def _near(asked: Sequence[str], kept: Sequence[str], threshold: float) -> Iterator[Hit]:
    for pair in near.pairs(asked, kept, threshold):
        yield pair.left, pair.right, "near", f"similarity {pair.similarity:.2f}"


def _answers(rows: Sequence[Example], border: int) -> Iterator[Hit]:
    telling = near.telling_answers(rows)
    places = {answer: index - border for index, answer in telling.items() if index >= border}
    for index, answer in telling.items():
        if index < border and answer in places:
            yield index, places[answer], "answer", ""


def _runs(asked: Sequence[str], kept: Sequence[str]) -> Iterator[Hit]:
    """A long run that both have, or short runs of one training row that cover half of a held-out question."""
    border = len(asked)
    shared = runs.shared([*asked, *kept])
    holder: dict[int, int] = {}
    for place in range(len(kept)):
        for run in shared.long[border + place]:
            holder.setdefault(run, place)
    for row in range(border):
        for run in [run for run in shared.long[row] if run in holder][:1]:
            yield row, holder[run], "run", shared.quote(row, run)[:80]
    for cover in shared.covers:
        if cover.outer < border <= cover.inner:
            yield cover.outer, cover.inner - border, "covered", f"{cover.words} of {cover.of} words"
