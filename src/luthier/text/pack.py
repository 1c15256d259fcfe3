"""Prefix trees: rows that begin alike are computed once up to where they part (DESIGN 1.2, performance section 4).

The trie is over token ids of *rendered* rows, never over text. Only what a loss needs is laid out: a row is cut before
its last supervised token, whose state predicts nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luthier.records import IntArray, Pack, Rendered

# A branch costs one more attention call in every layer, about what computing two dozen tokens again costs.
WORTH_SHARING = 24


@dataclass(frozen=True)
class Sharing:
    """What sharing bought: tokens of separate rows against tokens computed."""

    plain_tokens: int
    computed_tokens: int

    @property
    def factor(self) -> float:
        return self.plain_tokens / self.computed_tokens if self.computed_tokens else 1.0


def sharing(packs: Sequence[Pack]) -> Sharing:
    """Add up what a list of packs computes and what separate rows would have."""
    return Sharing(sum(pack.plain_tokens for pack in packs), sum(len(pack) for pack in packs))


def plan(rendered: Sequence[Rendered], *, budget: int, share: bool = True) -> list[Pack]:
    """Lay rows out as prefix trees of at most `budget` computed tokens each (one longer row stands alone).

    Every row that carries a weight is in exactly one pack. Packs are filled evenly, so that no last one is tiny.
    """
    rows = [row for row in (_Row.of(r) for r in rendered) if row is not None]
    if not rows:
        return []
    rows.sort(key=lambda row: row.ids)
    common = [0, *(_common(a.ids, b.ids) if share else 0 for a, b in itertools.pairwise(rows))]
    return [pack for lo, hi in _cut(rows, common, budget) for pack in _within(rows, common, lo, hi, budget)]


def paths(pack: Pack) -> list[IntArray]:
    """The tokens of each packed row, in order: indices into `pack.ids`, one array for each of `pack.rows`."""
    last = np.zeros(len(pack.rows), np.int64)
    np.maximum.at(last, pack.target_row, pack.target_source)  # a row ends where its last target is predicted
    found = []
    for end, segment in zip(
        last.tolist(), (np.searchsorted(pack.starts, last, side="right") - 1).tolist(), strict=True
    ):
        parts = [np.arange(pack.starts[segment], end + 1)]
        above = int(pack.parents[segment])
        while above >= 0:
            parts.append(np.arange(pack.starts[above], pack.starts[above + 1]))
            above = int(pack.parents[above])
        found.append(np.concatenate(parts[::-1]))
    return found


@dataclass(frozen=True)
class _Row:
    """A row cut to what its targets need: `ids` are computed, `at` are (position, id, weight) to predict."""

    ids: tuple[int, ...]
    at: tuple[tuple[int, int, float], ...]
    example_id: str
    plain_tokens: int

    @classmethod
    def of(cls, rendered: Rendered) -> _Row | None:
        pairs = enumerate(zip(rendered.ids, rendered.weights, strict=True))
        at = tuple((i, token, weight) for i, (token, weight) in pairs if i and weight)
        if not at:
            return None
        return cls(rendered.ids[: at[-1][0]], at, rendered.example_id, len(rendered.ids))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix of two id sequences."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    low, high = 0, size  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _cut(rows: Sequence[_Row], common: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Ranges of sorted rows, each within the budget, of about equal cost."""
    total = sum(len(row.ids) - shared for row, shared in zip(rows, common, strict=True))
    count = -(-total // budget)
    target = budget if count <= 1 else min(budget, total // count + max(len(row.ids) for row in rows))
    ranges, start, cost = [], 0, 0
    for index, row in enumerate(rows):
        more = len(row.ids) - (common[index] if index > start else 0)
        if index > start and cost + more > target:
            ranges.append((start, index))
            start, cost, more = index, 0, len(row.ids)
        cost += more
    return [*ranges, (start, len(rows))]


def _within(rows: Sequence[_Row], common: Sequence[int], lo: int, hi: int, budget: int) -> list[Pack]:
    """Lay out rows [lo, hi); halve them where prefixes too short to share made the pack larger than was counted."""
    pack = _lay_out(rows[lo:hi], [0, *common[lo + 1 : hi]])
    if len(pack) <= budget or hi - lo == 1:
        return [pack]
    middle = (lo + hi) // 2
    return [*_within(rows, common, lo, middle, budget), *_within(rows, common, middle, hi, budget)]


@dataclass
class _Segment:
    parent: int
    depth: int  # position of its first token
    ids: tuple[int, ...]


def _lay_out(rows: Sequence[_Row], common: Sequence[int]) -> Pack:
    """Build the trie of sorted rows depth first; `common[i]` is the prefix that rows i-1 and i share."""
    segments: list[_Segment] = []
    paths: list[list[int]] = [[] for _ in rows]
    todo: list[tuple[int, int, int, int]] = [(0, len(rows), 0, -1)]  # rows [lo, hi) share `depth` tokens above `parent`
    while todo:
        lo, hi, depth, parent = todo.pop()
        above = paths[lo]  # the path of every row of the group, so far
        if hi - lo == 1:
            if len(rows[lo].ids) > depth:
                segments.append(_Segment(parent, depth, rows[lo].ids[depth:]))
                paths[lo] = [*above, len(segments) - 1]
            continue
        shared = min(common[lo + 1 : hi])
        cuts = [lo, *(i for i in range(lo + 1, hi) if common[i] == shared), hi]
        if (shared - depth) * (hi - lo - 1) >= WORTH_SHARING:
            segments.append(_Segment(parent, depth, rows[lo].ids[depth:shared]))
            for row in range(lo, hi):
                paths[row] = [*above, len(segments) - 1]
            depth, parent = shared, len(segments) - 1
        groups = list(itertools.pairwise(cuts))
        todo.extend((a, b, depth, parent) for a, b in reversed(groups))
    return _flatten(rows, segments, paths)


def _flatten(rows: Sequence[_Row], segments: Sequence[_Segment], paths: Sequence[Sequence[int]]) -> Pack:
    starts = np.cumsum([0, *(len(segment.ids) for segment in segments)]).astype(np.int64)
    parents = np.array([segment.parent for segment in segments], np.int64)
    ids = np.concatenate([np.array(segment.ids, np.int64) for segment in segments])
    positions = np.concatenate([segment.depth + np.arange(len(segment.ids)) for segment in segments])
    sources, targets, weights, owners = [], [], [], []
    for index, (row, path) in enumerate(zip(rows, paths, strict=True)):
        token_at = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in path])
        assert len(token_at) == len(row.ids), "a path covers its row"
        for position, token, weight in row.at:
            sources.append(token_at[position - 1])
            targets.append(token)
            weights.append(weight)
            owners.append(index)
    return Pack(
        ids=ids,
        positions=positions.astype(np.int64),
        starts=starts,
        parents=parents,
        ends=_ends(starts, parents),
        target_source=np.array(sources, np.int64),
        target_ids=np.array(targets, np.int64),
        target_weights=np.array(weights, np.float32),
        target_row=np.array(owners, np.int64),
        rows=tuple(row.example_id for row in rows),
        plain_tokens=sum(row.plain_tokens for row in rows),
    )


def _ends(starts: IntArray, parents: IntArray) -> IntArray:
    """One past the last token of each subtree; children come after their parent, so walk backwards."""
    ends = starts[1:].copy()
    for segment in range(len(parents) - 1, -1, -1):
        if parents[segment] >= 0:
            ends[parents[segment]] = max(ends[parents[segment]], ends[segment])
    return ends
