"""Several processes as one, through accelerate: shares of the work, and sums. A single process pays nothing."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from luthier.training import shares

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=2)  # the others wait while the first tokenises; a dead one is noticed at once


def here(device: torch.device | str, *, sharded: bool = False) -> Ranks:
    """This process among those that were started together (torchrun's environment), on gloo or nccl."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    on_cpu = torch.device(device).type == "cpu"
    waits = InitProcessGroupKwargs(timeout=PATIENCE)
    return Ranks(Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[waits]), sharded=sharded)


class Ranks:
    """The processes that train together. Every method but `share` and `idle` must be called by all of them.

    `sharded` says that each holds a part of the base: then all must run the model equally often.
    """

    def __init__(self, accelerator: Accelerator, *, sharded: bool = False) -> None:
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.first: bool = accelerator.is_main_process
        self.sharded = sharded and self.count > 1

    def share(self, work: Sequence[T], cost: Callable[[T], float] = lambda _: 1.0) -> Sequence[T]:
        """This process's part of a list, of about equal cost; the parts are disjoint and cover it."""
        if self.count == 1:
            return work
        dealt = shares.rounds if self.sharded else shares.deal
        return [work[place] for place in dealt([cost(item) for item in work], self.count)[self.index]]

    def idle(self, work: Sequence[T]) -> int:
        """Passes to make beside this process's share of a list, so that all make equally many; 0 unless sharded."""
        if not self.sharded:
            return 0
        return -(-len(work) // self.count) - len(range(self.index, len(work), self.count))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place."""
        if self.count > 1:
            tensor.copy_(self._accelerator.reduce(tensor, reduction="sum"))
        return tensor

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """Add numbers up over all processes (float64)."""
        if self.count == 1:
            return numbers
        dtype = torch.float32 if self._accelerator.device.type == "mps" else torch.float64
        packed = torch.tensor(numbers, dtype=dtype, device=self._accelerator.device)
        return tuple(float(value) for value in self.sum_(packed))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack a CPU tensor of equal shape from every process: (processes, ...)."""
        if self.count == 1:
            return tensor[None]
        here = tensor[None].to(self._accelerator.device)
        gathered: torch.Tensor = self._accelerator.gather(here)
        return gathered.cpu()

    def exchange(self, value: Any) -> list[Any]:
        """Every process's JSON value, in order, in every process."""
        if self.count == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(text)])).flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(text)] = text
        found = self.gather(padded)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(found, sizes, strict=True)]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()
