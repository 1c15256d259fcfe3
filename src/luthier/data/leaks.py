"""Training rows that give a held-out row away (data generation reference, section 5, steps 1 to 4)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data import near
from luthier.records import Example

RUN, SHORT_RUN = 13, 8  # words
COVERED = 0.5  # of a held-out question, by 8-grams of one training row
THRESHOLD = 0.8  # Jaccard index of character n-grams
USUAL = 0.01  # of the training rows: word runs that so many share are the task's wording and tell nothing


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
            "run": f"shares {RUN} words in a row with",
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
        if (found := places.get(near.normal(text))) is not None:
            yield index, found, "same", ""


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
    """A shared run of 13 words, or 8-word runs of one training row that cover half of a held-out question."""
    lists = [near.words(text) for text in kept]
    yield from _long_runs(asked, _index(lists, RUN), max(10, USUAL * len(asked)))
    yield from _covering(asked, lists, max(10, USUAL * len(asked)))


def _index(lists: Sequence[list[str]], length: int) -> dict[tuple[str, ...], list[tuple[int, int]]]:
    """Where each run of words stands: (text, place)."""
    found: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for index, words in enumerate(lists):
        for place in range(len(words) - length + 1):
            found[tuple(words[place : place + length])].append((index, place))
    return found


def _runs_of(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[place : place + length]) for place in range(len(words) - length + 1))


def _long_runs(
    asked: Sequence[str], index: dict[tuple[str, ...], list[tuple[int, int]]], usual: float
) -> Iterator[Hit]:
    shared = [[run for run in dict.fromkeys(_runs_of(near.words(text), RUN)) if run in index] for text in asked]
    counts = Counter(run for runs in shared for run in runs)
    for row, runs in enumerate(shared):
        telling = next((run for run in runs if counts[run] <= usual), None)
        if telling:
            yield row, index[telling][0][0], "run", " ".join(telling)[:80]


def _covering(asked: Sequence[str], lists: Sequence[list[str]], usual: float) -> Iterator[Hit]:
    index = _index(lists, SHORT_RUN)
    shared = [[run for run in dict.fromkeys(_runs_of(near.words(text), SHORT_RUN)) if run in index] for text in asked]
    counts = Counter(run for runs in shared for run in runs)
    for row, runs in enumerate(shared):
        covered: dict[int, set[int]] = defaultdict(set)
        for run in (run for run in runs if counts[run] <= usual):
            for held, place in index[run]:
                covered[held].update(range(place, place + SHORT_RUN))
        best = max(covered, key=lambda held: len(covered[held]) / len(lists[held]), default=None)
        if best is not None and len(covered[best]) >= COVERED * len(lists[best]):
            yield row, best, "covered", f"{len(covered[best])} of {len(lists[best])} words"
