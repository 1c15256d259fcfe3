"""AdaLoRA: an update in the form of an SVD that gives ranks to the layers that need them (Zhang et al. 2303.10512)."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """AdaLoRA's settings."""

    first_rank: int = Field(12, ge=1, le=1024, description="rank of every layer at the start")
    rank: int = Field(8, ge=1, le=1024, description="rank of a layer on average at the end")
    alpha: float | None = Field(None, gt=0, description="scales the update, over first_rank; default twice that")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the update's input; under sharing exact in expectation")
    orthogonality: float = Field(0.5, ge=0, le=100, description="weight of the penalty that keeps directions apart")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps before ranks are taken away")
    settled: float = Field(0.33, ge=0, lt=1, description="share of the steps after the last rank is taken away")
    every: int = Field(1, ge=1, description="ranks are shared out every so many steps")

    @model_validator(mode="after")
    def _leave_something(self) -> Self:
        if self.rank > self.first_rank:
            raise ValueError("`rank` cannot be above `first_rank`: ranks are taken away")
        if self.warmup + self.settled >= 1:
            raise ValueError("`warmup` and `settled` leave no steps to take ranks away in")
        return self


class AdaLora(OnLinears):
    Options = Options
    kind = "ADALORA"
    fresh = "exact"  # the singular values start at zero
    learning_rate = 2e-3
    bracket = (5e-4, 5e-3)
    about = contracts.About(
        family="reparametrised",
        title="AdaLoRA: ranks go where they are needed",
        trains="two thin matrices and their singular values per linear layer",
        formula="h = W x + (alpha / r) P diag(l) Q x, P and Q nearly orthogonal, l pruned",
        source="Zhang et al. 2023, arXiv 2303.10512",
        sites=("linears",),
        text=(
            "LoRA gives every layer the same rank. AdaLoRA starts with more than it keeps, writes each update as "
            "directions and their strengths, watches which strengths matter to the loss, and sets the least important "
            "ones to zero step by step. A penalty keeps the directions apart, so that a strength means something. It "
            "has to know the number of steps beforehand, and wants many of them. The file holds what was pruned as "
            "zeros."
        ),
        folklore=(
            ("AdaLoRA takes an SVD", "it only has the form of one; a penalty keeps the factors near to orthogonal"),
            (
                "it beats LoRA",
                "a point on GLUE in the paper; 37.3 against 47.4 in PEFT's comparison, at LoRA's learning rate, "
                "which is too low for it",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names, but for those that depend on the number of steps."""
        options = self.options
        return {
            "init_r": options.first_rank,
            "target_r": options.rank,
            "lora_alpha": options.alpha if options.alpha is not None else 2 * options.first_rank,
            "lora_dropout": options.dropout,
            "orth_reg_weight": options.orthogonality,
            "deltaT": options.every,
            "target_modules": options.target_modules,
        }

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh AdaLoRA on the model; TrainingError where the number of steps is not known."""
        from luthier.adapt import adaptive

        schedule = {}
        if evidence is not None:
            total, options = evidence.total_steps, self.options
            schedule = {"tinit": int(options.warmup * total), "tfinal": int(options.settled * total)}
        return adaptive.attach(model, {**self.settings(), **schedule}, seed=seed, evidence=evidence)
