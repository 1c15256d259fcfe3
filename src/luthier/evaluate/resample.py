"""Resampling of clusters, vectorised: columns are metrics, systems or simulations; all see the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
CHUNK = 4_000_000  # cells of a block of draws: bounds memory at some tens of MB
EXACT = 13  # clusters up to which all sign flips are tried


def by_group(columns: Array, groups: NDArray[np.intp]) -> Array:
    """Sum rows (n, k) by group into (groups, k)."""
    sums = np.zeros((int(groups.max()) + 1, columns.shape[1]))
    np.add.at(sums, groups, columns)
    return sums


def means(sums: Array, sizes: Array, rng: np.random.Generator, draws: int) -> Array:
    """Bootstrap means (draws, k) from cluster sums (clusters, k) and cluster sizes (clusters,)."""
    count = len(sizes)
    block = max(1, CHUNK // count)
    parts = []
    for start in range(0, draws, block):
        weights = rng.multinomial(count, np.full(count, 1 / count), min(block, draws - start)).astype(float)
        parts.append((weights @ sums) / (weights @ sizes)[:, None])
    return np.concatenate(parts)


def interval(drawn: Array, points: Array, clusters: int) -> tuple[Array, Array]:
    """95 % percentile interval (k,), (k,), widened by Student's t so that few clusters do not look certain."""
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    if clusters < 2:
        return low, high
    widen = stats.t.ppf(0.975, clusters - 1) / stats.norm.ppf(0.975) * np.sqrt(clusters / (clusters - 1))
    return points - widen * (points - low), points + widen * (high - points)


def sign_flip(sums: Array, rng: np.random.Generator, draws: int) -> float:
    """Two-sided permutation p-value that cluster sums (clusters,) are as likely positive as negative."""
    p: Any = sign_flips(sums[:, None], rng, draws)[0]
    return float(p)


def sign_flips(sums: Array, rng: np.random.Generator, draws: int) -> Array:
    """`sign_flip` for every column of (clusters, k); exact for few clusters, else by random flips."""
    count = len(sums)
    seen = np.abs(sums.sum(0)) - 1e-9  # (k,)
    if count <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return np.asarray((np.abs(signs @ sums) >= seen).mean(0))
    hits = np.ones(sums.shape[1])  # the data as they are count as one flip
    block = max(1, CHUNK // count)
    for start in range(0, draws, block):
        signs = 1.0 - 2.0 * rng.integers(2, size=(min(block, draws - start), count))
        hits += (np.abs(signs @ sums) >= seen).sum(0)
    return np.asarray(hits / (1 + draws))
