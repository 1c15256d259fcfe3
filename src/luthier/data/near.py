"""Which texts are nearly the same: MinHash proposes, the exact Jaccard index of character n-grams decides.

An n-gram is five characters, or two where the first is Chinese, Japanese or Korean (about a word each). MinHash with
128 permutations: Broder 1997; bands: Leskovec et al., Mining of Massive Datasets, section 3.4.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.records import Example

THRESHOLD = 0.7
PERMUTATIONS = 128
WIDTH, DENSE_WIDTH = 5, 2
LONGEST = 20_000  # characters of a text that are compared
SLACK = 0.17  # a pair whose estimate is this far below the threshold is not checked (4 standard errors)
SHARED_LENGTH, SHARED_BY = 12, 0.5  # an instruction: so many characters, at the head or tail of so many texts
PROSE = 60  # characters from which an answer is prose and not a label
DISTINCT = 0.8  # share of distinct prose answers above which an equal answer means a reworded row
_BLOCK = 1 << 17  # n-grams hashed at a time: what a core keeps near (a third faster than two million)
_PAIRS = 1 << 17  # pairs of signatures compared at a time

Words = NDArray[np.uint64]


@lru_cache(1 << 15)
def normal(text: str) -> str:
    """The text without what does not tell texts apart: width, case, spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def clusters(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """Label each text with the index of the first text of its cluster (chains of near pairs make one cluster)."""
    forest = Forest(len(texts))
    first: dict[str, int] = {}
    for index, text in enumerate(normal(text) for text in texts):
        forest.join(first.setdefault(text, index), index)
    places = list(first.values())
    grams = ngrams(list(first))
    groups = _Groups(len(grams))
    for left, right in _candidates(grams, threshold, groups.of):
        if groups.of[left] != groups.of[right] and jaccard(grams[left], grams[right]) >= threshold:
            groups.join(left, right)
            forest.join(places[left], places[right])
    return [forest.root(index) for index in range(len(texts))]


@dataclass(frozen=True, slots=True)
class Pair:
    """Text `left` of the first list is near text `right` of the second."""

    left: int
    right: int
    similarity: float


def pairs(left: Sequence[str], right: Sequence[str], threshold: float = THRESHOLD) -> list[Pair]:
    """All near pairs between two lists, by falling similarity."""
    grams = ngrams([normal(text) for text in [*left, *right]])
    border = len(left)
    found = []
    for a, b in _candidates(grams, threshold, np.arange(len(grams)) < border):
        similarity = jaccard(grams[a], grams[b])
        if similarity >= threshold:
            found.append(Pair(a, b - border, similarity))
    return sorted(found, key=lambda pair: (-pair.similarity, pair.left, pair.right))


def ngrams(texts: Sequence[str]) -> list[Words]:
    """For each normalised text its sorted, distinct n-gram hashes, 64 bits; a text too short for one is one itself."""
    found: list[Words] = []
    for first, last in _blocks([min(len(text), LONGEST) + 1 for text in texts]):
        found += _ngrams_of([text[:LONGEST] for text in texts[first:last]])
    return found


def _ngrams_of(texts: Sequence[str]) -> list[Words]:
    sizes = np.array([len(text) for text in texts])
    joined = "".join(texts).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(joined, dtype="<u4").astype(np.uint64)
    hashes, owners, _ = windows(codes, sizes, _is_dense(codes), WIDTH, DENSE_WIDTH)
    order = np.lexsort((hashes, owners))
    hashes, owners = hashes[order], owners[order]
    fresh = np.ones(len(hashes), bool)
    fresh[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    hashes, owners = hashes[fresh], owners[fresh]
    sets = np.split(hashes, np.searchsorted(owners, np.arange(1, len(texts))))
    starts = np.cumsum(sizes) - sizes
    for index in np.flatnonzero([not len(one) for one in sets]):
        own = codes[starts[index] : starts[index] + sizes[index]]
        sets[index] = rolling(own, max(1, len(own)))
    return sets


def jaccard(left: Words, right: Words) -> float:
    """Shared over all n-grams of two sorted, distinct sets; 1 for two empty ones."""
    if not len(left) or not len(right):
        return float(len(left) == len(right))
    few, many = (left, right) if len(left) < len(right) else (right, left)
    shared = int((many.take(many.searchsorted(few), mode="clip") == few).sum())
    return shared / (len(left) + len(right) - shared)


def without_shared(texts: Sequence[str]) -> list[str]:
    """Take off the head and the tail that at least half of the distinct texts share (an instruction, a template).

    Otherwise a long instruction would make all rows of a task near duplicates of each other.
    """
    head, tail = shared_affixes(texts)
    return [_bare(text, head, tail) for text in texts]


def shared_affixes(texts: Sequence[str]) -> tuple[str, str]:
    """The longest head and tail that at least half of the distinct texts share; empty below 12 characters."""
    distinct = sorted(set(texts))
    head = _shared_head(distinct)
    bare = [text[len(head) :] if text.startswith(head) else text for text in distinct]
    tail = _shared_head(sorted({text[::-1] for text in bare}))[::-1]
    return head, tail


def questions(examples: Sequence[Example]) -> list[str]:
    """What is compared between rows: the question, or the text of a row that has none; without a shared instruction."""
    return without_shared([example.question or example.answer for example in examples])


def telling_answers(examples: Sequence[Example]) -> dict[int, str]:
    """Normalised answers, by row, of which a repetition means that the row was reworded: prose, mostly distinct.

    Labels, JSON and the stock answers of a service desk repeat by nature and tell nothing.
    """
    prose = {
        index: normal(example.answer)
        for index, example in enumerate(examples)
        if len(example.answer) >= PROSE and example.question and not _is_json(example.answer)
    }
    return prose if len(set(prose.values())) >= DISTINCT * len(prose) else {}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


class Forest:
    """Disjoint sets; the root of each is its smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def root(self, one: int) -> int:
        parent = self._parent
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def same(self, one: int, other: int) -> bool:
        return self.root(one) == self.root(other)


class _Groups:
    """Disjoint sets as an array: `of[i]` is the group of i. Of two that are joined the smaller takes the other's."""

    def __init__(self, size: int) -> None:
        self.of: NDArray[np.int64] = np.arange(size)
        self._members = {index: [index] for index in range(size)}

    def join(self, one: int, other: int) -> None:
        small, large = sorted((int(self.of[one]), int(self.of[other])), key=lambda group: len(self._members[group]))
        if small != large:
            moved = self._members.pop(small)
            self.of[moved] = large
            self._members[large] += moved


def _bare(text: str, head: str, tail: str) -> str:
    rest = text[len(head) :] if head and text.startswith(head) else text
    rest = rest[: len(rest) - len(tail)] if tail and rest.endswith(tail) else rest
    return rest if rest.strip() else text


def _shared_head(ordered: Sequence[str]) -> str:
    """Among sorted texts, those that share a head lie together: try every window of half of them."""
    window = max(2, int(len(ordered) * SHARED_BY + 0.5))
    if len(ordered) < 10:
        return ""
    ends = zip(ordered, ordered[window - 1 :], strict=False)
    head = max((_common(first, last) for first, last in ends), key=len, default="")
    return head if len(head) >= SHARED_LENGTH else ""


def _common(one: str, other: str) -> str:
    """The head that two texts share."""
    size = min(len(one), len(other))
    return one[: next((place for place in range(size) if one[place] != other[place]), size)]


def rolling(codes: Words, width: int) -> Words:
    """A hash of every run of `width` codes: a polynomial, then a mixer (splitmix64's finaliser)."""
    if len(codes) < width or not width:
        return np.empty(0, np.uint64)
    rolled = np.zeros(len(codes) - width + 1, np.uint64)
    for place in range(width):
        rolled = rolled * np.uint64(0x100000001B3) + codes[place : len(codes) - width + 1 + place]
    rolled = (rolled ^ (rolled >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    rolled = (rolled ^ (rolled >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return rolled ^ (rolled >> np.uint64(31))


def windows(
    codes: Words, sizes: NDArray[np.int64], dense: NDArray[np.bool_], width: int, dense_width: int
) -> tuple[Words, NDArray[np.int64], NDArray[np.int64]]:
    """Hashes of all runs of codes within texts that lie one after the other, `sizes` codes each.

    A run is `width` codes, or `dense_width` where it begins with a dense one. Returns hash, text and place of each.
    """
    owner = np.repeat(np.arange(len(sizes)), sizes)
    ends = np.cumsum(sizes)
    found = []
    for size, wanted in ((width, False), (dense_width, True)):
        rolled = rolling(codes, size)
        at = np.arange(len(rolled))
        at = at[(dense[: len(rolled)] == wanted) & (at + size <= ends[owner[: len(rolled)]])]
        found.append((rolled[at] ^ np.uint64(size), owner[at], at - (ends - sizes)[owner[at]]))
    hashes, owners, places = (np.concatenate(part) for part in zip(*found, strict=True))
    return hashes, owners, places


def _is_dense(codes: Words) -> NDArray[np.bool_]:
    """True for characters of scripts that pack a word into one or two of them."""
    han_or_kana = ((codes >= 0x3040) & (codes <= 0x9FFF)) | ((codes >= 0x20000) & (codes <= 0x3FFFF))
    return han_or_kana | ((codes >= 0xAC00) & (codes <= 0xD7A3)) | ((codes >= 0xF900) & (codes <= 0xFAFF))


def _candidates(grams: Sequence[Words], threshold: float, labels: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Pairs (a < b) that agree in a whole band of their signatures and in their estimate, of texts with other `labels`.

    Bands are as long as a recall of 0.999 at the threshold allows. `labels` may change between two pairs.
    """
    if len(grams) < 2:
        return
    signatures = _signatures(grams)
    coarse = signatures.astype(np.uint8)  # a quarter of the bytes, and one pair in 256 too many by chance
    rows = _rows_per_band(threshold)
    wanted = max(0.0, threshold - SLACK) * PERMUTATIONS
    seen: set[int] = set()
    for band in range(PERMUTATIONS // rows):
        for left, right in _colliding(signatures[:, band * rows : (band + 1) * rows], labels):
            for sketch in (coarse, signatures):
                close = _agreement(sketch, left, right) >= wanted
                left, right = left[close], right[close]
            for one, other in zip(left.tolist(), right.tolist(), strict=True):
                key = one * len(grams) + other
                if key not in seen and labels[one] != labels[other]:
                    seen.add(key)
                    yield one, other


def _agreement(sketch: NDArray[Any], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """In how many places the signatures of pairs agree, counted 64 places at a time."""
    equal = np.packbits((sketch[left] == sketch[right]).ravel()).view(np.uint64)
    counted: NDArray[np.int64] = np.bitwise_count(equal).reshape(len(left), PERMUTATIONS // 64).sum(1, dtype=np.int64)
    return counted


def _rows_per_band(threshold: float) -> int:
    for rows in range(16, 1, -1):
        missed = (1 - threshold**rows) ** (PERMUTATIONS // rows)
        if missed <= 0.001:
            return rows
    return 1


def _colliding(band: NDArray[np.uint32], labels: NDArray[Any]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs (a < b) of rows that are equal in a band and differ in their labels, many at a time.

    Rows are sorted by a 64-bit hash of the band (a collision only costs a comparison). Of those that lie together each
    is paired with all after it; what one label has taken over entirely is passed by.
    """
    order, ends = _sorted(band)
    places = np.flatnonzero(ends - np.arange(len(order)) > 1)
    counts = ends[places] - places - 1
    for first, last in _blocks(counts.tolist(), _PAIRS):
        at, many = places[first:last], counts[first:last]
        span = labels[order[at[0] : ends[at[-1]]]]
        if (span == span[0]).all():
            continue
        left = np.repeat(at, many)
        right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(many) - many, many)
        left, right = order[left], order[right]
        apart = labels[left] != labels[right]
        yield left[apart], right[apart]


def _sorted(band: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows in an order that puts equal ones together, by rising number, and for each place where its equals end."""
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = (keys ^ column) * np.uint64(0xBF58476D1CE4E5B9)
        keys ^= keys >> np.uint64(29)
    order = np.argsort(keys, kind="stable")
    borders = np.concatenate([[0], np.flatnonzero(np.diff(keys[order])) + 1, [len(keys)]])
    return order, np.repeat(borders[1:], np.diff(borders))


def _signatures(grams: Sequence[Words]) -> NDArray[np.uint32]:
    """MinHash signatures (texts, 128): the smallest of each permuted hash, 32 bits kept."""
    generator = np.random.default_rng(20260901)
    factors = generator.integers(1, 1 << 63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = generator.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64)
    signatures = np.full((len(grams), PERMUTATIONS), np.iinfo(np.uint32).max, np.uint32)
    for first, last in _blocks([len(one) for one in grams]):
        whole = np.concatenate(grams[first:last])
        sizes = np.array([len(one) for one in grams[first:last]])
        filled = np.flatnonzero(sizes)
        if not len(filled):
            continue
        starts = (np.cumsum(sizes) - sizes)[filled]
        for column in range(PERMUTATIONS):
            mixed = ((whole * factors[column] + offsets[column]) >> np.uint64(32)).astype(np.uint32)
            signatures[first + filled, column] = np.minimum.reduceat(mixed, starts)
    return signatures


def _blocks(sizes: Sequence[int], limit: int = _BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges of things whose sizes (n-grams of texts) come to about the limit together."""
    first = total = 0
    for index, size in enumerate(sizes):
        total += size
        if total >= limit:
            yield first, index + 1
            first, total = index + 1, 0
    if first < len(sizes):
        yield first, len(sizes)


def words(text: str) -> list[str]:
    """Words of a normalised text, for n-gram overlap; every Chinese, Japanese or Korean character is one."""
    return re.findall(r"[぀-鿿가-힣豈-﫿]|[^\W぀-鿿가-힣豈-﫿]+", normal(text))
