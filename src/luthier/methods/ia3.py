"""(IA)^3: learned factors on keys, values and the feed-forward's inner activations (Liu et al. 2205.05638)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts


class Options(contracts.Options):
    """(IA)^3's settings."""

    target_modules: list[str] | None = Field(None, description="layers whose outputs are scaled; else found by name")
    feedforward_modules: list[str] | None = Field(None, description="layers whose inputs are scaled; found by name")


class IA3(contracts.Method):
    Options = Options
    fresh = "exact"  # all factors start at one
    learning_rate = 5e-3
    bracket = (1e-3, 1e-1)
    about = contracts.About(
        family="additive",
        title="(IA)^3: learned factors on keys, values and inner activations",
        trains="one factor per key, value and feed-forward channel",
        formula="k' = l_k * k, v' = l_v * v, h = W_down (l_ff * a)",
        source="Liu et al. 2022, arXiv 2205.05638",
        sites=("kv_factors", "mlp_factors"),
        text=(
            "Each channel of the keys, the values and the feed-forward's inner layer gets one number that it is "
            "multiplied by; all start at one. Some ten thousand numbers are enough to tune a small model, and they "
            "fold into the weights. It wants a learning rate ten times LoRA's."
        ),
        folklore=(
            (
                "(IA)^3 is weak",
                "at LoRA's learning rate it is: 31 % against 46 % at fifty times that rate in PEFT's comparison",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put fresh factors on the model through PEFT; raise SpecError when no fitting layer is found."""
        from peft import IA3Config

        from luthier.adapt import targets, wrapped

        outputs, inputs = targets.factors(model, self.options.target_modules, self.options.feedforward_modules)
        config = IA3Config(task_type="CAUSAL_LM", target_modules=[*outputs, *inputs], feedforward_modules=inputs)
        return wrapped.attach(model, config, seed=seed)

    def groups(self, names: Any) -> dict[str, dict[str, float]]:
        """Decay would pull factors to zero, not to one: none."""
        return {name: {"weight_decay": 0.0} for name in names}
