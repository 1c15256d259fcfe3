"""Several tuned systems on the same rows, each from one or more seeds: scores with intervals, and who ties.

Two things vary: which rows were drawn and which seed the run had. The rows' part comes from a bootstrap over
independent groups in which all systems see the same draws, so differences are paired; the seeds' part is the variance
between runs over their number. Three seeds tell little of a variance, so it is pooled over the methods that have
several, and never taken smaller than a method's own; Student's t with Satterthwaite's degrees of freedom does the rest.
A method that ran once is lent the pooled variance; where every method ran once, the intervals know of rows only.

The best is whoever scores highest here, so comparing with it looks at all pairs: p-values are Holm's over all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from luthier.errors import UsageError
from luthier.evaluate import compare, resample
from luthier.records import Score

Aggregate = Callable[[Sequence[Score]], float | None]
Array = NDArray[np.float64]
DRAWS, CORPUS_DRAWS = 2000, 400


@dataclass(frozen=True)
class Gap:
    """A difference with its 95 % interval; `p` is adjusted for the comparisons that were made beside it."""

    difference: float
    low: float
    high: float
    p: float

    @property
    def clear(self) -> bool:
        """Whether the difference is shown not to be zero."""
        return self.p <= compare.LEVEL


@dataclass(frozen=True)
class Standing:
    """One system. `to_best` and `to_base` are its score less theirs; None for the best and the base themselves."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]  # the score of each run
    seed_share: float  # of the interval's variance that comes from seeds
    to_best: Gap | None
    to_base: Gap | None
    tied: bool  # cannot be told apart from the best


@dataclass(frozen=True)
class Ranking:
    """All systems, best first; the base stands apart. `seeds_known` tells whether any method ran more than once."""

    base: Standing
    systems: dict[str, Standing]
    n: int
    groups: int
    seeds_known: bool


def rank(
    base: Sequence[Score], systems: Mapping[str, Sequence[Sequence[Score]]], clusters: Sequence[Hashable], *,
    aggregate: Aggregate | None = None, higher_is_better: bool = True, seed: int = 0, draws: int | None = None,
) -> Ranking:  # fmt: skip
    """Rank systems by their mean score over runs; rows that any run leaves unscored are left out for all.

    `systems` holds each system's runs, `aggregate` is given for corpus metrics. UsageError where no row is left.
    """
    runs = [base, *(run for each in systems.values() for run in each)]
    scored = [i for i in range(len(base)) if all(run[i].value is not None for run in runs)]
    if not scored:
        raise UsageError("no row has a score for all systems", remedy="choose another metric")
    numbers = {name: place for place, name in enumerate(dict.fromkeys(clusters[i] for i in scored))}
    groups = np.array([numbers[clusters[i]] for i in scored], dtype=np.intp)
    kept = [[run[i] for i in scored] for run in runs]
    rng = np.random.default_rng(seed)
    values, drawn = (
        _means(kept, groups, rng, draws) if aggregate is None else _corpus(kept, groups, aggregate, rng, draws)
    )
    sizes = [len(each) for each in systems.values()]
    part = _Parts(["", *systems], values, drawn, [1, *sizes], len(numbers), 1 if higher_is_better else -1)
    return Ranking(part.standing(""), part.ranked(), len(scored), len(numbers), any(size > 1 for size in sizes))


class _Parts:
    """Scores of runs with their draws, by system; the base's name is empty."""

    def __init__(
        self, names: Sequence[str], values: Array, drawn: Array, sizes: Sequence[int], groups: int, sign: int
    ) -> None:
        ends = list(itertools.accumulate(sizes))
        self.names, self.sign, self._groups = list(names), sign, groups
        self._runs = {name: values[end - size : end] for name, end, size in zip(names, ends, sizes, strict=True)}
        self._drawn = {
            name: drawn[:, end - size : end].mean(1) for name, end, size in zip(names, ends, sizes, strict=True)
        }
        several = [runs for name, runs in self._runs.items() if name and len(runs) > 1]
        self._seed_freedom = sum(len(runs) - 1 for runs in several)
        squares = sum(float(runs.var(ddof=1)) * (len(runs) - 1) for runs in several)
        self._pooled = squares / self._seed_freedom if self._seed_freedom else 0.0

    def ranked(self) -> dict[str, Standing]:
        """Every system but the base, best first."""
        order = sorted(self.names[1:], key=lambda name: (-self.sign * self._value(name), self.names.index(name)))
        pairs = {(a, b): self._gap(a, b) for a, b in itertools.combinations(order, 2)}
        adjusted = compare.holm({f"{a}\0{b}": gap.p for (a, b), gap in pairs.items()})
        with_best = {b: _adjusted(gap, adjusted[f"{a}\0{b}"]) for (a, b), gap in pairs.items() if a == order[0]}
        return {name: self.standing(name, with_best.get(name)) for name in order}

    def standing(self, name: str, behind: Gap | None = None) -> Standing:
        rows, seeds = self._rows(self._drawn[name]), self._seeds(name)
        half = self._quantile(rows, seeds) * math.sqrt(rows + seeds)
        value = self._value(name)
        to_best = None if behind is None else Gap(-behind.difference, -behind.high, -behind.low, behind.p)
        return Standing(
            value=value,
            low=max(0.0, value - half),
            high=min(1.0, value + half),
            seeds=tuple(float(one) for one in self._runs[name]),
            seed_share=seeds / (rows + seeds),
            to_best=to_best,
            to_base=self._over_base[name] if name else None,
            tied=to_best is None or not to_best.clear,
        )

    @cached_property
    def _over_base(self) -> dict[str, Gap]:
        """Every system against the base."""
        gaps = {name: self._gap(name, "") for name in self.names[1:]}
        adjusted = compare.holm({name: gap.p for name, gap in gaps.items()})
        return {name: _adjusted(gap, adjusted[name]) for name, gap in gaps.items()}

    def _gap(self, a: str, b: str) -> Gap:
        """System a less system b; a p-value not yet adjusted."""
        difference = self._value(a) - self._value(b)
        rows = self._rows(self._drawn[a] - self._drawn[b])
        seeds = self._seeds(a) + self._seeds(b)
        spread, freedom = math.sqrt(rows + seeds), self._freedom(rows, seeds)
        half = self._quantile(rows, seeds) * spread
        p = float(2 * stats.t.sf(abs(difference) / spread, freedom)) if math.isfinite(spread) else 1.0
        return Gap(difference, difference - half, difference + half, p)

    def _value(self, name: str) -> float:
        return float(self._runs[name].mean())

    def _rows(self, drawn: Array) -> float:
        """Variance that comes from rows: the draws' own, made unbiased, and that of half a row's disagreement."""
        count = self._groups
        if count < 2:
            return math.inf
        return float(drawn.var()) * count / (count - 1) + 1 / (count * (count + 2))

    def _seeds(self, name: str) -> float:
        """Variance of a mean over runs; the base has no seed."""
        runs = self._runs[name]
        if not name:
            return 0.0
        own = float(runs.var(ddof=1)) if len(runs) > 1 else 0.0
        return max(own, self._pooled) / len(runs)

    def _freedom(self, rows: float, seeds: float) -> float:
        """Satterthwaite's degrees of freedom of the sum of both variances."""
        if not math.isfinite(rows):
            return 1.0
        parts = rows**2 / (self._groups - 1) + (seeds**2 / self._seed_freedom if seeds else 0.0)
        return (rows + seeds) ** 2 / parts

    def _quantile(self, rows: float, seeds: float) -> float:
        return float(stats.t.ppf(1 - compare.LEVEL / 2, self._freedom(rows, seeds)))


def _adjusted(gap: Gap, p: float) -> Gap:
    """A gap with its adjusted p-value; its interval is stretched to zero where that does not rule zero out."""
    if p <= compare.LEVEL:
        return Gap(gap.difference, gap.low, gap.high, p)
    return Gap(gap.difference, min(gap.low, 0.0), max(gap.high, 0.0), p)


def _means(
    runs: Sequence[Sequence[Score]], groups: NDArray[np.intp], rng: np.random.Generator, draws: int | None
) -> tuple[Array, Array]:
    """Mean scores (runs,) and bootstrap draws of them (draws, runs)."""
    columns = np.array([[score.value for score in run] for run in runs], dtype=float).T  # (rows, runs)
    sizes = np.bincount(groups).astype(float)
    return columns.mean(0), resample.means(resample.by_group(columns, groups), sizes, rng, draws or DRAWS)


def _corpus(
    runs: Sequence[Sequence[Score]], groups: NDArray[np.intp], aggregate: Aggregate, rng: np.random.Generator,
    draws: int | None,
) -> tuple[Array, Array]:  # fmt: skip
    """A corpus metric of every run (runs,), and aggregated again over drawn groups (draws, runs)."""
    members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]

    def values(chosen: Any) -> list[float]:
        return [float(aggregate([run[i] for i in chosen]) or 0.0) for run in runs]

    drawn = []
    for _ in range(draws or CORPUS_DRAWS):
        drawn.append(values(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])))
    return np.array(values(range(len(runs[0])))), np.array(drawn)
