"""A forecast of time and memory before training: operations are counted by rehearsal, this machine's speed is measured.

Nothing here knows a method. `training.memory` runs one step without numbers and logs what it multiplies; a run is that,
scaled by its tokens and targets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import ModelError
from luthier.records import Pack
from luthier.training.feed import ShuffledFeed

if TYPE_CHECKING:
    from luthier.training.memory import Memory
    from luthier.training.rehearsal import Log

# Share of the machine's matrix speed that a training step reaches; the rest goes into attention, norms and other
# passes over memory. An expectation, not yet a calibration: an untuned bf16 prototype reached 0.38 (performance section
# 2), a float32 step on a busy core 0.73.
REACHED = (0.35, 0.5, 0.75)
CALL = 8e-6  # seconds that one operation costs whatever its size
SPREAD = 0.15  # of the memory forecast: within this of what was measured (docs/plan.md)
LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
SAMPLE = 32  # steps whose packs are planned to learn what sharing will bring
ROWS = 512  # of the matrix product that is timed
HUGE = 1 << 26  # weights in one matrix from which fewer rows are enough


@dataclass(frozen=True)
class Tally:
    """What a whole run will compute, in tokens, and its largest pack."""

    tokens: int
    plain_tokens: int
    supervised: int
    largest: Pack | None
    packs: int
    steps: int


@dataclass(frozen=True)
class Answers:
    """Held-out rows that one system answers: tokens of their prompts, of which all begin with the same `shared`."""

    system: str
    rows: int
    tokens: int
    longest: int
    shared: int
    least: int  # new tokens of a batch's longest answer, if the system answers like the rows' own answers
    most: int  # and if it is cut off only by the limit


@dataclass(frozen=True)
class Cost:
    """Floating point operations, and calls of a kernel."""

    flops: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.calls + other.calls)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.calls * times)

    def seconds(self, gigaflops: float, reached: float) -> float:
        """Seconds at a share of a matrix speed."""
        return self.flops / (reached * gigaflops * 1e9) + CALL * self.calls


@dataclass(frozen=True)
class Speed:
    """GFLOP/s of this machine's matrix products: many rows at once, and the few of an answer's step."""

    wide: float
    narrow: float


@dataclass(frozen=True)
class Forecast:
    """Expected cost, to be shown as a forecast: seconds lie in [seconds_low, seconds_high] on an idle machine."""

    peak_bytes: int
    peak_bytes_high: int
    seconds: float | None  # None where the device is not here
    seconds_low: float | None
    seconds_high: float | None
    stages: Mapping[str, tuple[float, float]]  # seconds at least and at most of: tune, look, answer
    tokens_computed: int
    plain_tokens: int
    gigaflops: float | None  # of this machine, measured
    flops: Mapping[str, float]  # by stage
    steps: int

    @property
    def sharing_factor(self) -> float:
        """How many times fewer tokens are computed than separate rows would need."""
        return self.plain_tokens / max(1, self.tokens_computed)


def tally(feed: ShuffledFeed, sample: int = SAMPLE) -> Tally:
    """Plan the packs of some steps, spread over the run, and scale up; the feed's position is not touched."""
    total = feed.total_steps
    chosen = sorted({round(i * (total - 1) / max(1, sample - 1)) for i in range(min(sample, total))})
    packs = [pack for step in chosen for pack in feed.batch(step).packs]
    return _scaled(tally_packs(packs), total / len(chosen), total)


def tally_packs(packs: Sequence[Pack]) -> Tally:
    """Count packs that are at hand, each computed once."""
    return Tally(
        tokens=sum(len(pack) for pack in packs),
        plain_tokens=sum(pack.plain_tokens for pack in packs),
        supervised=sum(len(pack.target_ids) for pack in packs),
        largest=max(packs, key=len, default=None),
        packs=len(packs),
        steps=1,
    )


def _scaled(seen: Tally, times: float, steps: int) -> Tally:
    sums = {name: round(times * getattr(seen, name)) for name in ("tokens", "plain_tokens", "supervised", "packs")}
    return Tally(**sums, largest=seen.largest, steps=steps)


def cost_of_packs(log: Log, rehearsed: Pack, work: Tally) -> Cost:
    """Scale a rehearsed pack up to all packs: the body by tokens, the head by targets, calls by packs."""
    head = log.flops["logits"]
    body = sum(log.flops.values()) - head
    flops = body * work.tokens / len(rehearsed) + head * work.supervised / max(1, len(rehearsed.target_ids))
    return Cost(flops, log.operations * work.packs)


def cost_of_answers(log: Log, rehearsed: int, asked: Answers, batch_size: int, new: int) -> tuple[Cost, Cost]:
    """The prompts of one system's rows, and the steps of its answers with `new` tokens in each batch."""
    if log.first is None:
        return Cost(), Cost()
    batches = math.ceil(asked.rows / batch_size)
    prompts, calls = sum(log.first.flops.values()), log.first.operations
    tokens = asked.tokens - asked.shared * (asked.rows - batches)
    share = asked.rows / (batches * min(batch_size, asked.rows)) if asked.rows else 0.0
    step = Cost((sum(log.flops.values()) - prompts) * share, log.operations - calls)
    return Cost(prompts * tokens / rehearsed, calls * batches), step * (batches * new)


def plan(
    memory: Memory, work: Tally, tune: Cost, *, speed: Speed | None, looks: Cost | None = None,
    answers: Sequence[tuple[Cost, Cost, Cost]] = (),
) -> Forecast:  # fmt: skip
    """Forecast a run. `looks` are all dev losses; an answer is (prompts, least steps, most steps)."""
    look, most = looks or Cost(), sum((prompts + steps for prompts, _, steps in answers), Cost())
    stages: dict[str, tuple[float, float, float]] = {}
    if speed is not None:
        stages = {
            "tune": _span(tune, tune, speed.wide),
            "look": _span(look, look, speed.wide),
            "answer": _sum(
                span
                for prompts, least, steps in answers
                for span in (_span(prompts, prompts, speed.wide), _span(least, steps, speed.narrow))
            ),
        }
    low, middle, high = _sum(stages.values()) if stages else (None, None, None)
    return Forecast(
        peak_bytes=memory.total,
        peak_bytes_high=int(memory.total * (1 + SPREAD)),
        seconds=middle,
        seconds_low=low,
        seconds_high=high,
        stages={name: (stage[0], stage[2]) for name, stage in stages.items()},
        tokens_computed=work.tokens,
        plain_tokens=work.plain_tokens,
        gigaflops=speed.wide if speed else None,
        flops={"tune": tune.flops, "look": look.flops, "answer": most.flops},
        steps=work.steps,
    )


def _span(least: Cost, most: Cost, gigaflops: float) -> tuple[float, float, float]:
    """Seconds at least, about and at most."""
    low, middle, high = REACHED
    about = (least + most).seconds(gigaflops, middle) / 2
    return least.seconds(gigaflops, high), about, most.seconds(gigaflops, low)


def _sum(spans: Iterable[tuple[float, float, float]]) -> tuple[float, float, float]:
    low, middle, high = zip(*spans, strict=True) if (spans := list(spans)) else ((), (), ())
    return sum(low), sum(middle), sum(high)


def measure(hidden: int, inner: int, *, rows: int, dtype: Any, device: Any = "cpu", seconds: float = 0.25) -> float:
    """This machine's matrix speed in GFLOP/s, on the shape of a feed-forward layer with so many rows."""
    import torch

    rows = min(rows, 64) if hidden * inner > HUGE else rows
    left = torch.ones(rows, hidden, dtype=dtype, device=device)
    right = torch.ones(inner, hidden, dtype=dtype, device=device)
    work = 2.0 * left.shape[0] * right.numel()

    def once() -> float:
        begun = time.perf_counter()
        product = torch.nn.functional.linear(left, right)
        float(product[0, 0])  # waits for the device
        return time.perf_counter() - begun

    once()  # the first call chooses kernels
    ends, times = time.perf_counter() + seconds, [once()]
    while time.perf_counter() < ends:
        times.append(once())
    return work / sorted(times)[len(times) // 2] / 1e9


def file_bytes(folder: Path, dtype: str) -> int:
    """Bytes of a folder's weights that are not stored as `dtype` (F32, BF16 ...): they are converted while loading.

    Weights that are stored as they are used are mapped, and stand in memory once.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _header(path).items():
            if name != "__metadata__" and entry["dtype"] != dtype:
                begin, end = entry["data_offsets"]
                total += end - begin
    return total


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file's own table: 8 bytes of length, then JSON."""
    import json

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ModelError("is not a safetensors file", where=str(path))
        try:
            return dict(json.loads(file.read(length)))
        except ValueError as error:
            raise ModelError(f"is not a safetensors file ({error})", where=str(path)) from error
