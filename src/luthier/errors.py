"""The tree of errors: what happened, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: `where` (a `file:line` or a dotted key), `what` happened, the `remedy`."""

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.where}: {self.what}{remedy}" if self.where else f"{self.what}{remedy}"


class LuthierError(Exception):
    """Anything luthier raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "", faults: Sequence[Fault] = ()) -> None:
        self.faults = list(faults)
        self.what, self.where, self.remedy = what, where, remedy
        head = str(Fault(where, what, remedy))
        super().__init__("\n".join([head, *(f"  {fault}" for fault in self.faults)]))

    @classmethod
    def of(cls, what: str, faults: Iterable[Fault], *, remedy: str = "") -> LuthierError:
        """Join many faults into one error, so that a user mends them all in one go."""
        return cls(what, remedy=remedy, faults=list(faults))


class UsageError(LuthierError):
    """Wrong use: an unknown command, a missing file, a setting that cannot be."""

    exit_code = 2


class SpecError(UsageError):
    """The task YAML says something that cannot be done; `faults` lists all of it."""


class DataError(UsageError):
    """The rows are not what the task needs; `faults` lists every bad line."""


class UnknownName(UsageError):
    """A name that stands on no shelf and in no catalog."""


class MissingExtra(UsageError):
    """An optional library is needed; the remedy names the extra to install."""


class ModelError(LuthierError):
    """A model cannot be found, fetched, read or used as asked."""


class CheckpointError(LuthierError):
    """A checkpoint or adapter folder is damaged or belongs to something else."""


class StorageError(LuthierError):
    """The disk refused: full, read-only, over quota. What was there before is untouched."""


class BusyError(LuthierError):
    """Another living process holds the run."""


class TrainingError(LuthierError):
    """Training cannot go on: the loss is not a number, nothing is supervised, nothing is trainable."""


class Diverged(TrainingError):
    """Loss or gradient is not a number: this rate, or these rows, are too much for the model."""


class ProofFailed(LuthierError):
    """A required proof did not hold (merged and attached disagree, a reload changes logits)."""

    exit_code = 3
