"""Runs of words that two texts share: what is left of a text that was copied into another (13-grams and 8-grams)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from luthier.data.near import Words, windows, words

LONG, DENSE_LONG = 13, 20  # words in a row that prove a copy; a Chinese or Japanese character is no whole word
SHORT, DENSE_SHORT = 8, 13  # words in a row of which several may cover a text
COVERED = 0.5  # of a text's words, by short runs of one other text
USUAL = 0.01  # of the texts, and at least FEW: a long run that more of them share is the task's wording
FEW = 10


@dataclass(frozen=True, slots=True)
class Cover:
    """So many of text `inner`'s words stand in runs that text `outer` has too."""

    outer: int
    inner: int
    words: int
    of: int


@dataclass(frozen=True)
class Shared:
    """`long[i]` are the telling long runs of text i, by number (with their first place); `covers` all covered texts."""

    long: list[dict[int, int]]
    covers: list[Cover]
    words: list[list[str]]

    def quote(self, text: int, run: int) -> str:
        """The words of a long run of a text."""
        place = self.long[text][run]
        found = self.words[text][place : place + LONG]
        return "".join(found) if all(len(word) == 1 for word in found) else " ".join(found)


def shared(texts: Sequence[str]) -> Shared:
    """Find the long runs that some texts share, and the texts that short runs of another one cover."""
    split = [words(text) for text in texts]
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(word, len(numbers) + 1) for one in split for word in one], np.uint64)
    dense = np.array([word >= "぀" for one in split for word in one], bool)
    coded = _Coded(codes, dense, np.array([len(one) for one in split], np.int64))
    long: list[dict[int, int]] = [{} for _ in texts]
    for number, holders in enumerate(_telling(coded, LONG, DENSE_LONG, max(FEW, USUAL * len(texts)))):
        for text, places in holders.items():
            long[text][number] = places[0]
    return Shared(long, list(_covers(coded)), split)


@dataclass(frozen=True)
class _Coded:
    """All texts' words as numbers, one after the other."""

    codes: Words  # (words,)
    dense: NDArray[np.bool_]  # (words,)
    sizes: NDArray[np.int64]  # (texts,)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.sizes) - self.sizes

    def reach(self, text: int, place: int) -> range:
        """The places that a short run covers which begins at a place of a text."""
        dense = self.dense[self.starts[text] + place]
        return range(place, place + (DENSE_SHORT if dense else SHORT))


def _telling(coded: _Coded, width: int, dense_width: int, most: float) -> Iterator[dict[int, list[int]]]:
    """For each run that two to `most` texts hold: its places in each of them."""
    hashes, texts, places = windows(coded.codes, coded.sizes, coded.dense, width, dense_width)
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(counts)
    owner, place = texts[order], places[order]
    for index in np.flatnonzero(counts > 1):
        span = slice(ends[index] - counts[index], ends[index])
        holders: dict[int, list[int]] = defaultdict(list)
        for text, at in zip(owner[span].tolist(), place[span].tolist(), strict=True):
            holders[text].append(at)
        if 1 < len(holders) <= most:
            yield holders


def _covers(coded: _Coded) -> Iterator[Cover]:
    """All ordered pairs of texts of which the first covers half of the second."""
    covered: dict[tuple[int, int], set[int]] = defaultdict(set)
    for holders in _telling(coded, SHORT, DENSE_SHORT, FEW):
        for inner, places in holders.items():
            reach = {at for place in places for at in coded.reach(inner, place)}
            for outer in holders:
                if outer != inner:
                    covered[outer, inner] |= reach
    for (outer, inner), reach in covered.items():
        total = int(coded.sizes[inner])
        if len(reach) >= COVERED * total:
            yield Cover(outer, inner, len(reach), total)
