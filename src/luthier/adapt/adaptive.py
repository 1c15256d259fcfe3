"""AdaLoRA in a run: penalty, importance averages and rank allocation through luthier's loop (Zhang et al. 2303.10512).

PEFT's allocator does the arithmetic. It reads gradients from the parameters, so `stepped` puts the given ones there for
as long as it runs. Masked triplets stay in the file as zeros: leaving them out would change the order of sums, and a
reloaded adapter would no longer answer with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from luthier.adapt import wrapped
from luthier.contracts import Evidence
from luthier.errors import CheckpointError, SpecError, TrainingError

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
PATTERN = "rank_pattern."


class Adaptive(wrapped.PeftAdapted):
    """A base with AdaLoRA on it, whose layers give up ranks while they learn."""

    def __init__(self, peft: PeftModel) -> None:
        super().__init__(peft)
        self._allocator = self._tuner.rankallocator
        self._names = dict(self.model.named_parameters())  # as the allocator calls them
        for name, parameter in self._names.items():
            if "ranknum" in name:
                parameter.requires_grad_(False)  # which PEFT forgets on the meta device

    def penalty(self) -> torch.Tensor | None:
        """How far singular vectors are from orthogonal, `weight * mean ||P'P - 1||`, in float32."""
        weight = self.config.orth_reg_weight  # type: ignore[attr-defined]
        vectors = [(n, p.float()) for n, p in self._names.items() if "lora_A" in n or "lora_B" in n]
        if not weight or not vectors:
            return None
        distances = [_distance(p @ p.T if "lora_A" in name else p.T @ p) for name, p in vectors]
        mean: torch.Tensor = weight * torch.stack(distances).mean()
        return mean

    def stepped(self, done: int, total: int, gradients: Mapping[str, torch.Tensor]) -> Sequence[str]:
        """Update importances with this step's gradients and mask the least important triplets when it is time."""
        own = self.trainable()
        before = {name: p.detach().clone() for name, p in own.items() if "lora_E" in name}
        kept = {name: p.grad for name, p in own.items()}
        try:
            for name, parameter in own.items():
                given = gradients.get(name)
                parameter.grad = torch.zeros_like(parameter) if given is None else given.to(parameter.dtype)
            self._tuner.update_and_allocate(done)
        finally:
            for name, parameter in own.items():
                parameter.grad = kept[name]
        return [name for name, value in before.items() if not torch.equal(own[name], value)]

    def ranks(self) -> dict[str, int]:
        """How many triplets each layer holds that are not masked."""
        return {n: int((p != 0).sum()) for n, p in self._names.items() if "lora_E" in n}

    def state(self) -> dict[str, torch.Tensor]:
        """Importance averages and the mask, as float32 and bool on the CPU; zeros stand for what has not begun."""
        kept: dict[str, torch.Tensor] = {}
        for name in self._learning():
            for kind in AVERAGES:
                value = getattr(self._allocator, kind).get(name)
                like = torch.zeros_like(self._names[name]) if value is None else value
                kept[f"{kind}.{name}"] = like.detach().to("cpu", torch.float32, copy=True)
        pattern = self.config.rank_pattern or {}  # type: ignore[attr-defined]
        for name in self._singular():
            mask = pattern.get(name, [True] * len(self._names[name]))
            kept[PATTERN + name] = torch.tensor(mask, dtype=torch.bool)
        return kept

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put a `state()` back; CheckpointError where it is another adapter's."""
        if state.keys() != self.state().keys():
            raise CheckpointError("the saved importances do not fit this adapter", remedy="start a new run")
        for kind in AVERAGES:
            table = getattr(self._allocator, kind)
            for name in self._learning():
                parameter = self._names[name]
                table[name] = state[f"{kind}.{name}"].to(parameter.device, parameter.dtype, copy=True)
        masks = {name: state[PATTERN + name].tolist() for name in self._singular()}
        begun = not all(all(mask) for mask in masks.values())
        self.config.rank_pattern = masks if begun else None  # type: ignore[attr-defined]

    def kept(self) -> dict[str, torch.Tensor]:
        """All triplets, masked ones as zeros."""
        config: Any = self.config
        pattern, config.rank_pattern = config.rank_pattern, None
        try:
            return super().kept()
        finally:
            config.rank_pattern = pattern

    def settings(self) -> dict[str, Any]:
        """The configuration without the mask, which the file's zeros tell already."""
        return {**super().settings(), "rank_pattern": None}

    def _learning(self) -> list[str]:
        return [name for name in self._names if "lora_" in name and "default" in name]

    def _singular(self) -> list[str]:
        return [name for name in self._names if "lora_E" in name]


def _distance(product: torch.Tensor) -> torch.Tensor:
    unit = torch.eye(len(product), device=product.device, dtype=product.dtype)
    distance: torch.Tensor = torch.linalg.vector_norm(product - unit)
    return distance


def attach(model: Any, options: Mapping[str, Any], *, seed: int, evidence: Evidence | None = None) -> Adaptive:
    """Put a fresh AdaLoRA on the model with a schedule for the run's length.

    Unless `options` say otherwise, ranks fall from a tenth of the steps on, and stand for the last third (the paper's
    shares). TrainingError without evidence, but for the meta device, where only shapes matter.
    """
    meta = next(model.parameters()).device.type == "meta"
    if evidence is None and not meta:
        raise TrainingError("AdaLoRA shares out ranks over the run's length, which is not known here", where="method")
    total = int(options.get("total_step") or (evidence.total_steps if evidence else 1))
    settings = {"target_modules": "all-linear", **options, "total_step": total}
    settings.setdefault("tinit", total // 10)
    settings.setdefault("tfinal", total // 3)
    if settings["tinit"] >= total - settings["tfinal"]:
        raise SpecError(
            f"of {total} steps, {settings['tinit']} before and {settings['tfinal']} after leave none for pruning",
            where="method",
            remedy="lower tinit or tfinal, or train for more steps",
        )
    config = wrapped.configure("ADALORA", **settings)
    made = wrapped.attach(model, config, seed=seed, made=Adaptive)
    assert isinstance(made, Adaptive)
    return made
