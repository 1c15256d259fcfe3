"""This machine's limits: how fast it multiplies matrices of given shapes, and how fast it reads memory.

Each shape is timed alone, with warm caches and in the better of two layouts, so the limit is one that no whole step
reaches: a step also has attention, norms, and other passes over memory.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

ROUNDS = 3  # over all shapes, so that a busy moment does not hit one shape alone
CALLS = 3  # samples of one shape in a round, at least
SECONDS = 0.04  # of one shape in a round
SAMPLE = 1e-3  # seconds that one sample lasts at least: more calls of small shapes
READ = 1 << 26  # float32 numbers of the matrix that is read: 268 MB, beyond any cache
COVERED = 0.97  # of the work: the rarest shapes are not timed


@dataclass(frozen=True, order=True)
class Product:
    """A matrix of (rows, inner) times one of (inner, columns)."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Spread:
    """A figure as it is told: the median of `count` measurements and the least and the most of them."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        seen = list(values)
        return cls(statistics.median(seen), min(seen), max(seen), len(seen))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"median": self.median, "low": self.low, "high": self.high, "count": self.count}


@dataclass(frozen=True)
class Limit:
    """Speed of the products of a piece of work, by round: operations a second over all, and of each shape."""

    rates: tuple[float, ...]  # operations a second of the whole mixture, one for each round
    products: Mapping[Product, Spread]  # operations a second of each shape
    times: Mapping[Product, float]  # how often the work needs each shape

    @property
    def rate(self) -> Spread:
        return Spread.of(self.rates)

    def joined(self, later: Limit) -> Limit:
        """This limit with a later measurement of the same work: before and after, as a machine's speed drifts."""
        products = {
            one: Spread(
                statistics.mean((a.median, later.products[one].median)), min(a.low, later.products[one].low),
                max(a.high, later.products[one].high), a.count + later.products[one].count,
            )
            for one, a in self.products.items()
        }  # fmt: skip
        return Limit((*self.rates, *later.rates), products, self.times)


def measure(
    work: Mapping[Product, float], *, dtype: torch.dtype, device: Any = "cpu", rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> Limit:  # fmt: skip
    """Time each shape of some work (shape: how often) and say how fast the mixture could run at most.

    Shapes that are under 3 % of the work together are left out. Threads are those that torch has been given.
    """
    chosen = _most(work)
    calls = {one: _calls(one, dtype, torch.device(device)) for one in chosen}
    found: dict[Product, list[float]] = {one: [] for one in chosen}
    rates = []
    for _ in range(rounds):
        for one, ways in calls.items():
            found[one].append(min(_median_seconds(way, seconds, torch.device(device)) for way in ways))
        total = sum(chosen[one] * found[one][-1] for one in chosen)
        rates.append(sum(times * one.flops for one, times in chosen.items()) / total)
    products = {one: Spread.of(one.flops / taken for taken in times) for one, times in found.items()}
    return Limit(tuple(rates), products, chosen)


def _most(work: Mapping[Product, float]) -> dict[Product, float]:
    """The shapes that make up most of the work, largest share first."""
    by_share = sorted(work, key=lambda one: -work[one] * one.flops)
    total, covered, chosen = sum(times * one.flops for one, times in work.items()), 0.0, dict[Product, float]()
    for one in by_share:
        if covered >= COVERED * total and chosen:
            break
        chosen[one] = work[one]
        covered += work[one] * one.flops
    return chosen


def _calls(one: Product, dtype: torch.dtype, device: torch.device) -> list[Callable[[], Any]]:
    """The product in both layouts of its right matrix."""
    left = torch.full((one.rows, one.inner), 0.5, dtype=dtype, device=device)
    right = torch.full((one.inner, one.columns), 0.5, dtype=dtype, device=device)
    turned = right.T.contiguous().T
    out = torch.empty(one.rows, one.columns, dtype=dtype, device=device)
    return [lambda: torch.mm(left, right, out=out), lambda: torch.mm(left, turned, out=out)]


def _median_seconds(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """The median time of one call, from samples of at least a millisecond."""
    _wait(device)
    call()  # chooses kernels
    first = _sample(call, 1, device)
    repeats = max(1, int(SAMPLE / max(first, 1e-7)))
    ends, samples = time.perf_counter() + seconds, [first] if repeats == 1 else []
    while len(samples) < CALLS or time.perf_counter() < ends:
        samples.append(_sample(call, repeats, device))
    return statistics.median(samples)


def _sample(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - begun) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_speed(*, device: Any = "cpu", numbers: int = READ, rounds: int = ROUNDS) -> Spread:
    """Bytes a second that are read at most: a large float32 matrix is multiplied with one vector, or added up.

    An answer's step at batch 1 reads every weight once and can go no faster, whatever the weights' dtype.
    """
    place = torch.device(device)
    width = 4096
    matrix = torch.full((max(1, numbers // width), width), 0.5, device=place)
    vector = torch.full((width,), 0.5, device=place)
    ways: list[Callable[[], Any]] = [lambda: torch.mv(matrix, vector), lambda: matrix.sum()]
    return Spread.of(matrix.nbytes / min(_median_seconds(way, SECONDS, place) for way in ways) for _ in range(rounds))


@dataclass(frozen=True)
class Reading:
    """What one pass of a frozen model over tokens costs: sizes of its matrices, and bytes that every pass reads."""

    body: Mapping[tuple[int, int], int]  # (inputs, outputs): how many such matrices
    head: tuple[int, int]
    weights: int  # bytes of body and head, packed where they are

    def products(self, tokens: int, positions: int) -> dict[Product, float]:
        """The products of so many tokens, with the head on so many positions."""
        told = {Product(tokens, *sizes): float(count) for sizes, count in self.body.items()}
        head = Product(positions, *self.head)
        return {**told, head: told.get(head, 0.0) + 1.0}


def reading(model: Any) -> Reading:
    """Look at a model's matrices; embeddings are looked up, not multiplied, but where the head is tied to them."""
    from transformers.pytorch_utils import Conv1D

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    body: Counter[tuple[int, int]] = Counter()
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):  # those of bitsandbytes too
            body[module.in_features, module.out_features] += 1
        elif isinstance(module, Conv1D):
            body[module.weight.shape[0], module.weight.shape[1]] += 1
    looked_up = 0 if table.weight is head.weight else table.weight.nbytes
    weights = sum(weight.nbytes for weight in model.parameters()) - looked_up
    return Reading(dict(body), (head.weight.shape[1], head.weight.shape[0]), weights)
