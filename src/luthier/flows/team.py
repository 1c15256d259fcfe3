"""A run in several processes: all of them go through the same flow, and the first one writes.

The others work on the same rows at the same time; what they write goes to a folder that is thrown away.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import store
from luthier.errors import SpecError
from luthier.records import Completion, Pack
from luthier.spec import RunSpec

if TYPE_CHECKING:
    from luthier.training.ranks import Ranks

Prompts = Sequence[Sequence[int]]


def started() -> int:
    """How many processes a launcher (ours or torchrun) has started together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


class Team:
    """The processes of this run, of which this is one; without `ranks` it is alone."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self.count = ranks.count if ranks else 1
        self.first = ranks.first if ranks else True
        self.sharded = bool(ranks and ranks.sharded)

    @classmethod
    def of(cls, spec: RunSpec) -> Team:
        """Meet the processes that were started together, each on its own GPU or with its share of the cores."""
        whole = spec.train.sharding == "none"
        if started() == 1:
            if not whole:
                remedy = "train.processes: 2 or more, or auto"
                raise SpecError("`full` needs several processes", where="train.sharding", remedy=remedy)
            return cls()
        import torch

        from luthier.model.load import pick_device
        from luthier.training import ranks

        device = pick_device(spec.model.device)
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        elif spec.train.threads or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads(spec.train.threads or torch.get_num_threads()))
        return cls(ranks.here(device, sharded=not whole))

    @contextmanager
    def holding(self, run: store.Run) -> Iterator[store.Run]:
        """Hold the run's lock in the first process; yield where this process writes."""
        if self.first:
            with run.lock():
                self.wait()
                yield run
            return
        self.wait()
        with tempfile.TemporaryDirectory(prefix="luthier-") as scratch:
            yield store.Run(Path(scratch))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the body, then the others: they find what it kept on disk."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def agreed(self, answer: bool) -> bool:
        """The first process's answer, in every process."""
        return bool(self.ranks.exchange(answer)[0]) if self.ranks else answer

    def answers(self, prompts: Prompts, answer: Callable[[Prompts], list[Completion]]) -> list[Completion]:
        """Answer prompts, a share in each process; a base in parts needs all of them for each."""
        if self.ranks is None or self.sharded:
            return answer(prompts)
        places = self.ranks.share(range(len(prompts)), lambda place: float(len(prompts[place])))
        own = answer([prompts[place] for place in places]) if places else []
        told = [[place, dataclasses.asdict(one)] for place, one in zip(places, own, strict=True)]
        found = {place: _completion(one) for of_one in self.ranks.exchange(told) for place, one in of_one}
        return [found[place] for place in range(len(prompts))]

    def planner(self, model: Any) -> Callable[..., list[Pack]]:
        """How rows become packs: for several processes, small enough that each has its share."""
        from luthier.text import pack

        if self.count == 1:
            return pack.plan
        from luthier.training import shares

        return shares.planner(self.count, shares.Cost.of(model), in_step=self.sharded)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.ranks:
            self.ranks.wait()


def threads(whole: int) -> int:
    """This process's share of so many CPU threads."""
    return max(1, whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _completion(told: dict[str, Any]) -> Completion:
    return Completion(told["text"], tuple(told["ids"]), told["stop"], tuple(told["logprobs"]))
