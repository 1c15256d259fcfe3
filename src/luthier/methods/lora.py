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
    init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default", description="A's first values; orthogonal starts both matrices so that their product is zero"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank), for ranks of 32 and more (2312.03732)")


class Lora(contracts.Method):
    Options = Options
    learning_rate = 1e-3
    bracket = (5e-5, 5e-3)
    about = contracts.About(
        family="reparametrised",
        title="LoRA: a low-rank update beside every linear layer",
        trains="two thin matrices A and B per linear layer",
        formula="h = W x + (alpha / r) B A x",
        source="Hu et al. 2021, arXiv 2106.09685",
        sites=("linears",),
        text=(
            "The base's matrices stay frozen; beside each of them two thin matrices learn, whose product is added to "
            "its output. B starts at zero, so training starts from the base itself. Folded into the weights it costs "
            "nothing when the model answers. The first method to try: robust, small, and understood by every server."
        ),
        folklore=(
            (
                "LoRA decomposes the weights by SVD",
                "training does no SVD; AdaLoRA imitates its form, PiSSA starts from one",
            ),
            (
                "a higher rank helps",
                "which layers are adapted matters more than the rank: all linear layers, MLPs above all",
            ),
            ("an adapter is an output layer on top", "it sits inside every block; an output layer on top is a head"),
        ),
    )

    @property
    def fresh(self) -> str:  # type: ignore[override]
        """B starts at zero; orthogonal first values cancel up to rounding."""
        return "tolerance" if self.options.init == "orthogonal" else "exact"

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh LoRA on the model through PEFT."""
        from luthier.adapt import wrapped

        options = self.options
        config = wrapped.configure(
            "LORA",
            r=options.rank,
            lora_alpha=options.alpha if options.alpha is not None else 2 * options.rank,
            lora_dropout=options.dropout,
            target_modules=options.target_modules,
            use_rslora=options.rslora,
            init_lora_weights=True if options.init == "default" else options.init,
        )
        return wrapped.attach(model, config, seed=seed)
