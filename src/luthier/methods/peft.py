"""The door to all of PEFT's shelf: `method: {name: peft, type: gralora, options: {r: 16}}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from luthier import contracts
from luthier.adapt import door
from luthier.registry import suggestion


class Options(contracts.Options):
    """The type and its own options, under PEFT's names."""

    type: str = Field("lora", description="one of PEFT's types, in any case: gralora, adamss, psoft, ...")
    options: dict[str, Any] = Field({}, description="fields of that type's configuration class, under PEFT's names")

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        kind = value.upper()
        if kind in door.REFUSED:
            raise ValueError(f"PEFT's {kind} cannot be used here: it {door.REFUSED[kind]}")
        if kind not in door.OPEN:
            near = suggestion(value, [name.lower() for name in door.OPEN])
            raise ValueError(f"PEFT has no type '{value}': {near}")
        return kind

    @model_validator(mode="after")
    def _fit(self) -> Options:
        """Hold the options against the type's class. Only here is PEFT imported: when a task names this method."""
        if not self.options:
            return self
        from luthier.adapt import allow

        found = allow.faults(self.type, self.options)
        if found:
            raise ValidationError.from_exception_data("options", [_line(fault, self.options) for fault in found])
        return self


def _line(fault: Any, given: dict[str, Any]) -> InitErrorDetails:
    told = f"{fault.what} ({fault.remedy})" if fault.remedy else fault.what
    error = PydanticCustomError("option", "{told}", {"told": told})
    return InitErrorDetails(type=error, loc=("options", fault.where), input=given.get(fault.where))


class Peft(contracts.Method):
    Options = Options
    about = contracts.About(
        family="reparametrised",
        title="The door to PEFT's shelf: any of its types by name",
        trains="what the type adds; by default beside all linear layers",
        formula="h = (W + dW(parameters of the type)) x",
        source="Mangrulkar et al. 2022, github.com/huggingface/peft",
        sites=("linears",),
        text=(
            "PEFT keeps some forty ways of tuning. Those that most people want have a page of their own here; this one "
            "opens all others, with PEFT's own option names. A type passes the same laws as every method, or is "
            "refused with the reason: some would make a row's answer depend on its neighbours, some change the base."
        ),
        folklore=(("a newer type beats LoRA", "at its own best learning rate each is close: search before you rank"),),
    )

    @property
    def _entry(self) -> door.Entry:
        return door.OPEN[self.options.type]

    @property
    def fresh(self) -> str:  # type: ignore[override]
        """As the type's layers start."""
        return self._entry.fresh

    @property
    def not_merged(self) -> str:  # type: ignore[override]
        """Why this type cannot be folded in; empty where it can."""
        return self._entry.not_merged

    @property
    def learning_rate(self) -> float:  # type: ignore[override]
        """The type's usual peak."""
        return self._entry.learning_rate

    @property
    def bracket(self) -> tuple[float, float]:  # type: ignore[override]
        """Where a search for this type's learning rate begins."""
        return self._entry.bracket

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh adapter of the type on the model; SpecError where PEFT finds the options impossible for it."""
        from luthier.adapt import shelf

        return shelf.attach(model, self.options.type, self.options.options, seed=seed, evidence=evidence)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay only what begins at zero or noise."""
        return door.undecayed(names)
