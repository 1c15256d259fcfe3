"""What methods that PEFT puts on linear layers have in common: which layers, and how they are attached."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from luthier import contracts
from luthier.adapt import door


class LinearOptions(contracts.Options):
    """Which layers are tuned."""

    target_modules: Literal["all-linear"] | list[str] = Field("all-linear", description="which layers are tuned")


class RankOptions(LinearOptions):
    """A low-rank update's settings."""

    rank: int = Field(16, ge=1, le=1024, description="width of the update; more adapts more, rarely better")
    alpha: float | None = Field(None, gt=0, description="scale of the update, before it is divided; default 2 rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the update's input; under sharing exact in expectation")

    def lora(self) -> dict[str, Any]:
        """The same under PEFT's names."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha if self.alpha is not None else 2 * self.rank,
            "lora_dropout": self.dropout,
            "target_modules": self.target_modules,
        }


class OnLinears(contracts.Method):
    """A method that is one of PEFT's types with settings of its own."""

    kind: ClassVar[str]  # PEFT's name of the type

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names; what is left out is filled in for the base."""

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh adapter on the model through PEFT; SpecError where the options do not fit the base."""
        from luthier.adapt import shelf

        return shelf.attach(model, self.kind, self.settings(), seed=seed, evidence=evidence)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay only what begins at zero or noise."""
        return door.undecayed(names)
