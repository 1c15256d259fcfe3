"""What a training run has come to: evaluations, the best one, counters, and the outcome that is reported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

RISE = 1.01  # a dev loss this much above the best is more than rounding
NOISE = 2  # evaluations after the best before a rise counts


@dataclass(frozen=True)
class Evaluation:
    """One look at the dev rows; `train_loss` is the mean since the look before."""

    step: int
    epoch: float
    train_loss: float
    dev_loss: float


@dataclass
class Totals:
    """Sums over all steps, those before a resume included."""

    examples: int = 0
    tokens: int = 0
    plain_tokens: int = 0
    supervised: float = 0.0
    seconds: float = 0.0


@dataclass
class Progress:
    """The loop's counters: what a checkpoint must hold beside tensors."""

    step: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    best_step: int | None = None
    best_dev_loss: float | None = None
    without_gain: int = 0  # dev losses since the best one
    loss_sum: float = 0.0  # of training, since the last evaluation
    loss_count: float = 0.0
    stopped_early: bool = False
    totals: Totals = field(default_factory=Totals)

    def look(self, epoch: float, dev_loss: float, patience: int | None) -> bool:
        """Take in a dev loss; return whether it is the best so far."""
        train_loss = self.loss_sum / self.loss_count if self.loss_count else float("nan")
        self.evaluations.append(Evaluation(self.step, epoch, train_loss, dev_loss))
        self.loss_sum = self.loss_count = 0.0
        if self.best_dev_loss is None or dev_loss < self.best_dev_loss:
            self.best_step, self.best_dev_loss, self.without_gain = self.step, dev_loss, 0
            return True
        self.without_gain += 1
        self.stopped_early = patience is not None and self.without_gain >= patience
        return False

    def overfit(self) -> str:
        """The alarm: dev loss rising for several looks while training loss falls; empty when all is well."""
        if self.without_gain < NOISE:
            return ""
        best = next(look for look in self.evaluations if look.step == self.best_step)
        last = self.evaluations[-1]
        if last.dev_loss < best.dev_loss * RISE or not last.train_loss < best.train_loss:
            return ""
        return (
            f"over-fitting: from step {best.step} to {last.step} the dev loss rose {best.dev_loss:.4f} -> "
            f"{last.dev_loss:.4f} while the training loss fell {best.train_loss:.4f} -> {last.train_loss:.4f}"
        )

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Progress:
        """Read what `as_json` wrote."""
        looks = [Evaluation(**look) for look in value["evaluations"]]
        return cls(**{**value, "evaluations": looks, "totals": Totals(**value["totals"])})


@dataclass(frozen=True)
class Outcome:
    """What the record keeps. `ended`: complete, early (patience), interrupted (a signal), or running."""

    ended: str
    steps: int
    total_steps: int
    saved_step: int  # of the newest checkpoint; 0: none
    resumed_from: int | None
    restored_step: int  # whose values the adapter now has
    best_step: int | None
    best_dev_loss: float | None
    evaluations: tuple[Evaluation, ...]
    overfit: str
    notes: tuple[str, ...]
    totals: Totals
    trainable: int

    def as_json(self) -> dict[str, Any]:
        """The outcome as JSON, for `record.json`."""
        return asdict(self)
