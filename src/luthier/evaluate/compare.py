"""Paired statistics: did the tuned model beat the base on the same items, by how much, and how sure is that?

Basis: evaluation reference section 3; Miller 2411.00640 (clusters), Bowyer et al. 2503.01747 (no normal law for few
items), Hesterberg 2015 (percentile bootstrap widened by Student's t).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from luthier.errors import UsageError
from luthier.evaluate import resample
from luthier.records import Score

Array = NDArray[np.float64]
Interval = tuple[float, float]
Aggregate = Callable[[Sequence[Score]], float | None]
MARGIN = 0.02  # differences inside count as none
LEVEL = 0.05
FEW = 20  # clusters below which intervals are widened visibly
POWER = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))  # 2.80: level 5 %, power 80 %
CORPUS_DRAWS = 2000


@dataclass(frozen=True)
class Comparison:
    """What one metric says about two systems on the same items. Values and differences are in the metric's unit."""

    metric: str
    n: int  # items scored for both
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    p_value: float
    p_better: float  # probability that tuned is truly better
    base_interval: Interval
    tuned_interval: Interval
    method: str
    smallest_detectable_gain: float
    verdict: str  # better | worse | same | cannot tell
    needed: int | None  # further items that would settle it, where it cannot be told
    unscored: int  # items left out because a side has no score
    note: str

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def paired(
    base: Sequence[Score],
    tuned: Sequence[Score],
    clusters: Sequence[Hashable],
    *,
    binary: bool,
    seed: int,
    draws: int = 10_000,
    metric: str = "",
    aggregate: Aggregate | None = None,
    higher_is_better: bool = True,
) -> Comparison:
    """Compare two systems item by item; `aggregate` is given for corpus metrics, else the mean is taken.

    Binary values without clusters take McNemar's mid-p test and the Agresti-Min interval, all else a bootstrap over
    clusters. Raises UsageError when no item is scored on both sides.
    """
    assert len(base) == len(tuned) == len(clusters), "the same items in the same order"
    both = [i for i, (one, other) in enumerate(zip(base, tuned, strict=True)) if None not in (one.value, other.value)]
    if not both:
        raise UsageError("no item has a score for both systems", where=metric, remedy="choose another metric")
    sides = [base[i] for i in both], [tuned[i] for i in both]
    groups = _numbered([clusters[i] for i in both])
    count = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    if aggregate is not None:
        found = _corpus(*sides, groups, aggregate, rng, min(draws, CORPUS_DRAWS))
    else:
        values = np.array([[score.value for score in side] for side in sides], dtype=float)
        plain = binary and count == len(both) and bool(np.isin(values, (0, 1)).all())
        found = _binary(values, rng) if plain else _means(values, groups, rng, draws)
    return _judged(metric, len(both), len(base) - len(both), found, higher_is_better)


def mcnemar_mid_p(broken: Any, fixed: Any) -> Any:
    """Two-sided mid-p of McNemar's exact test, elementwise; 1 where the systems never disagree."""
    broken, fixed = np.asarray(broken), np.asarray(fixed)
    total, fewer = broken + fixed, np.minimum(broken, fixed)
    pmf = stats.binom.pmf(fewer, total, 0.5)
    p = 2 * stats.binom.cdf(fewer, total, 0.5) - pmf
    return np.where(total == 0, 1.0, np.where(broken == fixed, 1 - pmf / 2, np.minimum(p, 1.0)))


def agresti_min(broken: Any, fixed: Any, n: Any) -> tuple[Any, Any]:
    """95 % interval of a paired difference of rates, elementwise (Agresti and Min 2005, half an item added)."""
    b, c, items = np.asarray(broken) + 0.5, np.asarray(fixed) + 0.5, np.asarray(n) + 2
    delta = (c - b) / items
    half = stats.norm.ppf(0.975) * np.sqrt(b + c - (c - b) ** 2 / items) / items
    return np.maximum(delta - half, -1), np.minimum(delta + half, 1)


def wilson(right: float, n: float) -> Interval:
    """95 % interval of one rate; `right` may be a sum of shares, for which it is wide enough."""
    z2 = float(stats.norm.ppf(0.975)) ** 2
    p = right / n
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low, high = max(0.0, float(middle - half)), min(1.0, float(middle + half))
    return (0.0 if p == 0 else low), (1.0 if p == 1 else high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for looking at several metrics (Holm 1979)."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class _Found:
    """A difference with its uncertainty, before it is judged."""

    base: float
    tuned: float
    interval: Interval
    base_interval: Interval
    tuned_interval: Interval
    p_value: float
    p_better: float
    detectable: float
    method: str
    note: str = ""


def _binary(values: Array, rng: np.random.Generator) -> _Found:
    base, tuned = values  # (2, n)
    n = values.shape[1]
    fixed, broken = int(((tuned == 1) & (base == 0)).sum()), int(((base == 1) & (tuned == 0)).sum())
    kept = int(((base == 1) & (tuned == 1)).sum())
    low, high = agresti_min(broken, fixed, n)
    theta = rng.dirichlet([kept + 1, broken + 1, fixed + 1, n - kept - broken - fixed + 1], 20_000)
    return _Found(
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        interval=(float(low), float(high)),
        base_interval=wilson(float(base.sum()), n),
        tuned_interval=wilson(float(tuned.sum()), n),
        p_value=float(mcnemar_mid_p(broken, fixed)),
        p_better=float((theta[:, 2] > theta[:, 1]).mean()),
        detectable=_detectable(tuned - base, np.arange(n)),
        method="McNemar mid-p, Agresti-Min interval",
    )


def _means(values: Array, groups: NDArray[np.intp], rng: np.random.Generator, draws: int) -> _Found:
    base, tuned = values  # (2, n)
    difference = tuned - base
    sizes = np.bincount(groups).astype(float)  # (clusters,)
    columns = np.stack([base, tuned, difference], axis=1)  # (n, 3)
    sums = resample.by_group(columns, groups)  # (clusters, 3)
    drawn = resample.means(sums, sizes, rng, draws)  # (draws, 3)
    bounds = _intervals(drawn, columns.mean(0), len(sizes), columns)
    return _Found(
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        interval=bounds[2],
        base_interval=bounds[0],
        tuned_interval=bounds[1],
        p_value=resample.sign_flip(sums[:, 2], rng, draws),
        p_better=float((drawn[:, 2] > 0).mean() + (drawn[:, 2] == 0).mean() / 2),
        detectable=_detectable(difference, groups),
        method="paired bootstrap" if len(sizes) == len(base) else f"paired bootstrap over {len(sizes)} clusters",
        note=_few(len(sizes), "" if np.ptp(difference) else "every item differs by the same amount"),
    )


def _corpus(
    base: list[Score],
    tuned: list[Score],
    groups: NDArray[np.intp],
    aggregate: Aggregate,
    rng: np.random.Generator,
    draws: int,
) -> _Found:
    """Re-aggregate the metric over resampled clusters; the p-value swaps the two systems cluster by cluster."""

    def value(scores: Sequence[Score]) -> float:
        return float(aggregate(scores) or 0.0)

    whole = value(base), value(tuned)
    members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
    drawn = np.empty((draws, 3))
    swapped = np.empty(draws)
    for draw in range(draws):
        chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        drawn[draw, :2] = value([base[i] for i in chosen]), value([tuned[i] for i in chosen])
        flip = rng.integers(2, size=len(members))[groups]
        pairs = [(b, a) if f else (a, b) for a, b, f in zip(base, tuned, flip, strict=True)]
        swapped[draw] = value([b for _, b in pairs]) - value([a for a, _ in pairs])
    drawn[:, 2] = drawn[:, 1] - drawn[:, 0]
    points = np.array([*whole, whole[1] - whole[0]])
    bounds = _intervals(drawn, points, len(members), drawn)
    return _Found(
        *whole,
        interval=bounds[2],
        base_interval=bounds[0],
        tuned_interval=bounds[1],
        p_value=float((1 + (np.abs(swapped) >= abs(points[2]) - 1e-12).sum()) / (1 + draws)),
        p_better=float((drawn[:, 2] > 0).mean() + (drawn[:, 2] == 0).mean() / 2),
        detectable=max(POWER * float(drawn[:, 2].std()), POWER / (len(members) + 2)),
        method="corpus metric, paired bootstrap and approximate randomisation",
        note=_few(len(members)),
    )


def _bounded(values: Array, low: float, high: float, clusters: int, floor: float) -> Interval:
    """Clip to what the values can be (from `floor` to 1); where nothing varies, leave room for items not drawn."""
    usual = values.min() >= floor and values.max() <= 1
    if clusters < 2 and usual:
        return floor, 1.0
    if not np.ptp(values):
        if floor == 0 and values[0] in (0.0, 1.0):
            return wilson(float(values[0]) * clusters, clusters)
        half = float(stats.norm.ppf(0.975)) / (clusters + 2)  # Agresti-Min with no disagreement
        low, high = values[0] - half, values[0] + half
    return (max(float(low), floor), min(float(high), 1.0)) if usual else (float(low), float(high))


def _intervals(drawn: Array, points: Array, clusters: int, raw: Array) -> list[Interval]:
    """Intervals of base, tuned and difference from their bootstrap draws (draws, 3); `raw` tells what varies."""
    low, high = resample.interval(drawn, points, clusters)
    floors = (0.0, 0.0, -1.0)
    return [_bounded(raw[:, i], float(low[i]), float(high[i]), clusters, floors[i]) for i in range(3)]


def _few(clusters: int, note: str = "") -> str:
    few = f"only {clusters} independent groups: intervals are widened by Student's t" if clusters < FEW else ""
    return "; ".join(filter(None, (note, few)))


def _numbered(clusters: Sequence[Hashable]) -> NDArray[np.intp]:
    """Number clusters in the order of their first item: the same in every process."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)


def _detectable(difference: Array, groups: NDArray[np.intp]) -> float:
    """Smallest true gain seen with 80 % power: 2.80 sqrt(v deff / n), half an item added to each side.

    v is the variance of the differences. For small gains it is the share of items that differ, as the reference has
    it; for large ones that share would count the gain itself as noise.
    """
    n = len(difference)
    square, mean = ((difference**2).sum() + 1) / (n + 2), difference.sum() / (n + 2)
    return min(1.0, POWER * float(np.sqrt((square - mean**2) * design_effect(difference, groups) / n)))


def design_effect(difference: Array, groups: NDArray[np.intp]) -> float:
    """Variance of the mean with clusters over that of independent items; at least 1."""
    n, count = len(difference), int(groups.max()) + 1
    spread = float(difference.var(ddof=1)) / n if n > 1 else 0.0
    if count < 2 or count == n or not spread:
        return 1.0
    sums = np.bincount(groups, weights=difference - difference.mean())
    return max(1.0, count / (count - 1) * float((sums**2).sum()) / n**2 / spread)


def _judged(metric: str, n: int, unscored: int, found: _Found, higher_is_better: bool) -> Comparison:
    difference = found.tuned - found.base
    low, high, note = _tested(found)
    verdict = _verdict(*((low, high) if higher_is_better else (-high, -low)))
    return Comparison(
        metric=metric,
        n=n,
        base=found.base,
        tuned=found.tuned,
        difference=difference,
        low=low,
        high=high,
        p_value=found.p_value,
        p_better=found.p_better if higher_is_better else 1 - found.p_better,
        base_interval=found.base_interval,
        tuned_interval=found.tuned_interval,
        method=found.method,
        smallest_detectable_gain=found.detectable,
        verdict=verdict,
        needed=_needed(n, difference, found.detectable) if verdict == "cannot tell" else None,
        unscored=unscored,
        note=note,
    )


def _tested(found: _Found) -> tuple[float, float, str]:
    """The interval, stretched to zero where the test does not rule zero out: a verdict needs both to agree."""
    low, high = found.interval
    if found.p_value <= LEVEL or low <= 0 <= high:
        return low, high, found.note
    note = f"the interval is stretched to zero, which the test does not rule out (p = {found.p_value:.3f})"
    return min(low, 0.0), max(high, 0.0), "; ".join(filter(None, (found.note, note)))


def _verdict(low: float, high: float) -> str:
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "same" if low >= -MARGIN and high <= MARGIN else "cannot tell"


def _needed(n: int, difference: float, detectable: float) -> int | None:
    """How many further items would show a difference of this size; None where there is none to show."""
    if abs(difference) < 1e-9:
        return None
    return max(1, int(np.ceil(n * (detectable / abs(difference)) ** 2)) - n)
