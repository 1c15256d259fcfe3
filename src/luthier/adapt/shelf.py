"""Any type of PEFT's on a base: defaults that fit the base, a seed of ours, and then `wrapped.attach`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.adapt import allow, door, targets, wrapped
from luthier.adapt.door import Entry
from luthier.contracts import Adapted, Evidence
from luthier.errors import SpecError


def attach(
    model: Any, kind: str, options: Mapping[str, Any], *, seed: int, evidence: Evidence | None = None
) -> Adapted:
    """Put a fresh adapter of PEFT's `kind` on the model; what `options` leaves out is filled in for this base.

    SpecError for keys that may not be set and for settings that PEFT finds impossible here.
    """
    found = allow.faults(kind, options)
    if found:
        raise SpecError(f"options that PEFT's {kind} cannot have", where="method.options", faults=found)
    if kind == "ADALORA":
        from luthier.adapt import adaptive

        return adaptive.attach(model, options, seed=seed, evidence=evidence)
    return wrapped.attach(model, wrapped.configure(kind, **fill_in(model, kind, options, seed)), seed=seed)


def fill_in(model: Any, kind: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The options with what a task need not say: which layers, which seed, a width that divides this base's."""
    entry, known = door.OPEN[kind], allow.fields(kind)
    settings: dict[str, Any] = {key: value for key, value in entry.defaults.items() if key in known}
    settings |= {key: seed % 2**31 for key in allow.SEEDS if key in known}
    if entry.divides and entry.divides not in options:
        settings[entry.divides] = targets.common_width(model, int(allow.defaults(kind)[entry.divides]))
    settings |= {key: value for key, value in options.items() if value is not None}
    if "target_modules" in known and "target_modules" not in settings:
        settings |= _targets(model, entry, options)
    return settings


def _targets(model: Any, entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    if entry.targets == "norms":
        return {"target_modules": targets.norms(model)}
    if entry.targets == "embeddings":
        return {"target_modules": targets.embeddings(model)}
    if entry.targets == "factors":
        outputs, inputs = targets.factors(model, None, options.get("feedforward_modules"))
        return {"target_modules": [*outputs, *inputs], "feedforward_modules": inputs}
    return {"target_modules": "all-linear"}
