"""Several processes as one, through accelerate: shares of the work, and sums. A single process pays nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class Ranks:
    """The processes that train together. Every method but `share` must be called by all of them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.first: bool = accelerator.is_main_process

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part of a list; the parts are disjoint and cover it."""
        return work if self.count == 1 else work[self.index :: self.count]

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

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()
