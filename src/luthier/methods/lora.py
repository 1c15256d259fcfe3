"""LoRA: a low-rank update beside every linear layer, W x + (alpha / r) B A x (Hu et al. 2106.09685)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from luthier import contracts


class Options(contracts.Options):
    """LoRA's settings; the defaults suit a hundred to some thousand rows."""

    rank: int = Field(16, ge=1, le=1024, description="width of the update; more adapts more, rarely better")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; default 2 rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the update's input; under sharing exact in expectation")
    target_modules: Literal["all-linear"] | list[str] = Field("all-linear", description="which layers get an update")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank), for ranks of 32 and more (2312.03732)")


class Lora(contracts.Method):
    Options = Options
    fresh = "exact"  # B starts at zero
    learning_rate = 1e-3

    def attach(self, model: Any, *, seed: int) -> contracts.Adapted:
        """Put a fresh LoRA on the model through PEFT."""
        from peft import LoraConfig

        from luthier.model import adapt

        options = self.options
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=options.alpha if options.alpha is not None else 2 * options.rank,
            lora_dropout=options.dropout,
            target_modules=options.target_modules,
            use_rslora=options.rslora,
        )
        return adapt.attach(model, config, seed=seed)
