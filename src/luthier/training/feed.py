"""What each optimiser step sees, with a position that fits in one line of JSON.

The order of an epoch is a pure function of seed and epoch, so a resumed run needs no replay and draws no randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from luthier.errors import TrainingError
from luthier.records import Example, Pack, Rendered
from luthier.text import pack

Plan = Callable[..., list[Pack]]  # plan(rendered, *, budget, share)


@dataclass(frozen=True)
class StepBatch:
    """The packs of one optimiser step. `epoch` is how far through the data it ends (1.0: one pass)."""

    packs: tuple[Pack, ...]
    epoch: float
    examples: int


class Feed(Protocol):
    """An endless-enough iterator of step batches that knows where it stands."""

    total_steps: int

    @property
    def steps_per_epoch(self) -> int | None:
        """None where it is not known before the data has been read."""

    def __iter__(self) -> Iterator[StepBatch]: ...

    def __next__(self) -> StepBatch: ...

    def state(self) -> dict[str, Any]:
        """The position, as JSON: after `restore` the next batch is the one that would have come."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state` returned."""


class ShuffledFeed:
    """Rows in memory, reshuffled each epoch; the short last batch of an epoch is kept."""

    def __init__(
        self,
        rendered: Sequence[Rendered | Sequence[Rendered]],
        *,
        batch_size: int,
        seed: int,
        epochs: float,
        max_steps: int | None = None,
        budget: int,
        share: bool = True,
        plan: Plan = pack.plan,
    ) -> None:
        """`rendered` has one entry per example: its row, or all its branches (preferences have two)."""
        self._examples = [(one,) if isinstance(one, Rendered) else tuple(one) for one in rendered]
        if not any(row.supervised for branches in self._examples for row in branches):
            raise TrainingError("no training row has a supervised token", remedy="`luthier show` shows the mask")
        self._batch_size, self._seed = batch_size, seed
        self._budget, self._share, self._plan = budget, share, plan
        self._step = 0
        self.steps_per_epoch: int = math.ceil(len(self._examples) / batch_size)
        wanted = max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self.total_steps = wanted if max_steps is None else min(wanted, max_steps)

    def __iter__(self) -> ShuffledFeed:
        return self

    def __next__(self) -> StepBatch:
        if self._step >= self.total_steps:
            raise StopIteration
        self._step += 1
        return self.batch(self._step - 1)

    def batch(self, step: int) -> StepBatch:
        """The batch of a 0-based step: a pure function."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self._batch_size
        chosen = self.order(epoch)[first : first + self._batch_size]
        rows = [row for index in chosen for row in self._examples[index]]
        packs = self._plan(rows, budget=self._budget, share=self._share)
        done = (first + len(chosen)) / len(self._examples)
        return StepBatch(tuple(packs), epoch + done, len(chosen))

    def order(self, epoch: int) -> list[int]:
        """Indices of the examples in the order of an epoch."""
        generator = np.random.default_rng([self._seed, epoch])
        return [int(index) for index in generator.permutation(len(self._examples))]

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])


class ExampleStream(Protocol):
    """Examples without end, read through a shuffle buffer, with a resumable cursor (`data.stream.Stream`)."""

    epoch: int  # passes over the files that are complete

    def __next__(self) -> Example: ...

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state` returned."""


class StreamFeed:
    """Rows read while training; `max_steps` is the only end. Nothing is read ahead, so the cursor is exact."""

    steps_per_epoch: int | None = None

    def __init__(
        self,
        stream: ExampleStream,
        render: Callable[[Example], Rendered | Sequence[Rendered]],
        *,
        batch_size: int,
        max_steps: int,
        budget: int,
        share: bool = True,
        plan: Plan = pack.plan,
    ) -> None:
        self._stream, self._render, self._plan = stream, render, plan
        self._batch_size, self._budget, self._share = batch_size, budget, share
        self._step = 0
        self.total_steps = max_steps

    def __iter__(self) -> StreamFeed:
        return self

    def __next__(self) -> StepBatch:
        if self._step >= self.total_steps:
            raise StopIteration
        rows: list[Rendered] = []
        for _ in range(self._batch_size):
            branches = self._render(next(self._stream))
            rows += [branches] if isinstance(branches, Rendered) else branches
        packs = self._plan(rows, budget=self._budget, share=self._share)
        self._step += 1
        return StepBatch(tuple(packs), float(self._stream.epoch), self._batch_size)

    def state(self) -> dict[str, Any]:
        return {"step": self._step, "stream": self._stream.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        self._stream.restore(state["stream"])
