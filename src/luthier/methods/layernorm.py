"""Norm tuning: only the gains (and biases, where there are any) of the normalisation layers learn (2312.11420)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier import contracts
from luthier.errors import SpecError


class Options(contracts.Options):
    """Norm tuning has no settings of its own."""


class LayerNorm(contracts.Method):
    Options = Options
    fresh = "exact"
    learning_rate = 3e-3
    bracket = (5e-4, 1e-2)
    about = contracts.About(
        family="selective",
        title="norm tuning: only the normalisation layers learn",
        trains="the gains of all norms, the last one's included",
        formula="h = g * x / rms(x), only g learns",
        source="Zhao et al. 2023, arXiv 2312.11420",
        sites=("norms",),
        text=(
            "Every block normalises its input and multiplies each channel by a gain; only these gains learn (and the "
            "biases of LayerNorms that have them). That is 35,136 numbers in SmolLM2-135M, fewer than almost any "
            "other method, and they cost nothing when the model answers. They want a learning rate some hundred times "
            "that of full tuning; no decay, which would pull gains to zero."
        ),
        folklore=(
            ("norm tuning does not work", "0 % in PEFT's comparison is its learning rate of 1e-4, which moves nothing"),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put trainable copies of all norms on the model through PEFT."""
        from peft import LNTuningConfig

        from luthier.adapt import blocks, wrapped

        names = [name for name, module in model.named_modules() if blocks.is_norm(module)]
        if not names:
            raise SpecError("this model has no norms with gains", where="method", remedy="use lora")
        return wrapped.attach(model, LNTuningConfig(task_type="CAUSAL_LM", target_modules=names), seed=seed)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay would pull gains to zero: none."""
        return {name: {"weight_decay": 0.0} for name in names}
