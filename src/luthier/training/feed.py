"""What each optimiser step sees, with a position that fits in one line of JSON.

The order of an epoch is a pure function of seed and epoch, so a resumed run needs no replay and draws no randomness.
What a step costs does not grow with the rows: an order is drawn once an epoch, and only a step's own rows become Python
objects (`text.kept` holds the others on disk).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from luthier.errors import TrainingError
from luthier.records import Example, IntArray, Pack, Rendered
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
    """Rows by number, in memory or on disk, reshuffled each epoch; the short last batch of an epoch is kept."""

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
        """`rendered` has one entry per example: its row, or all its branches (preferences have two).

        It is read by number, a step's rows at a time, and never copied.
        """
        self._rendered = rendered
        if not any(row.supervised for index in range(len(rendered)) for row in self._branches(index)):
            raise TrainingError("no training row has a supervised token", remedy="`luthier show` shows the mask")
        self._batch_size, self._seed = batch_size, seed
        self._budget, self._share, self._plan = budget, share, plan
        self._step = 0
        self._drawn: tuple[int, IntArray] | None = None  # the epoch whose order was drawn last, and that order
        self.steps_per_epoch: int = math.ceil(len(rendered) / batch_size)
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
        chosen = self._order(epoch)[first : first + self._batch_size].tolist()
        rows = [row for index in chosen for row in self._branches(index)]
        packs = self._plan(rows, budget=self._budget, share=self._share)
        done = (first + len(chosen)) / len(self._rendered)
        return StepBatch(tuple(packs), epoch + done, len(chosen))

    def order(self, epoch: int) -> list[int]:
        """Indices of the examples in the order of an epoch."""
        return [int(index) for index in self._order(epoch)]

    def _order(self, epoch: int) -> IntArray:
        if self._drawn is None or self._drawn[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._drawn = epoch, generator.permutation(len(self._rendered))
        return self._drawn[1]

    def _branches(self, index: int) -> Sequence[Rendered]:
        found = self._rendered[index]
        return (found,) if isinstance(found, Rendered) else found

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
