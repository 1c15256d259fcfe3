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
_BLOCK = 1 << 21  # n-grams hashed at a time

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
    unique = list(first)
    places = list(first.values())
    grams = ngrams(unique)
    for left, right in _candidates(grams, threshold, known=lambda a, b: forest.same(places[a], places[b])):
        if jaccard(grams[left], grams[right]) >= threshold:
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
    for a, b in _candidates(grams, threshold, known=lambda a, b: (a < border) == (b < border)):
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
    shared = len(np.intersect1d(left, right, assume_unique=True))
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


def _candidates(grams: Sequence[Words], threshold: float, known: object) -> Iterator[tuple[int, int]]:
    """Pairs (a < b) that agree in a whole band of their signatures and in their estimate; not those already `known`.

    Bands are as long as a recall of 0.999 at the threshold allows.
    """
    assert callable(known)
    if len(grams) < 2:
        return
    signatures = _signatures(grams)
    rows = _rows_per_band(threshold)
    wanted = max(0.0, threshold - SLACK) * PERMUTATIONS
    seen: set[int] = set()
    for band in range(PERMUTATIONS // rows):
        for bucket in _buckets(signatures[:, band * rows : (band + 1) * rows]):
            for place, one in enumerate(bucket[:-1]):
                others = bucket[place + 1 :]
                agree = (signatures[others] == signatures[one]).sum(1)
                for other in others[agree >= wanted].tolist():
                    key = int(one) * len(grams) + other
                    if key not in seen and not known(int(one), other):
                        seen.add(key)
                        yield int(one), other


def _rows_per_band(threshold: float) -> int:
    for rows in range(16, 1, -1):
        missed = (1 - threshold**rows) ** (PERMUTATIONS // rows)
        if missed <= 0.001:
            return rows
    return 1


def _buckets(band: NDArray[np.uint32]) -> Iterator[NDArray[np.int64]]:
    """Groups of two or more rows that are equal in a band, each in rising order."""
    keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.dtype.itemsize * band.shape[1]))).ravel()
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(counts)
    for index in np.flatnonzero(counts > 1):
        yield order[ends[index] - counts[index] : ends[index]]


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


def _blocks(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of texts with about two million n-grams together."""
    first = total = 0
    for index, size in enumerate(sizes):
        total += size
        if total >= _BLOCK:
            yield first, index + 1
            first, total = index + 1, 0
    if first < len(sizes):
        yield first, len(sizes)


def words(text: str) -> list[str]:
    """Words of a normalised text, for n-gram overlap; every Chinese, Japanese or Korean character is one."""
    return re.findall(r"[぀-鿿가-힣豈-﫿]|[^\W぀-鿿가-힣豈-﫿]+", normal(text))
