"""RandLoRA: random low-rank pieces, weighed so that they add up to full rank (Albert et al. 2502.00987)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """RandLoRA's settings."""

    rank: int = Field(
        32, ge=1, le=1024, description="width of each random piece; smaller means more pieces and more parameters"
    )
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; default 20 rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the update's input; under sharing exact in expectation")


class RandLora(OnLinears):
    Options = Options
    kind = "RANDLORA"
    fresh = "exact"  # one vector of each piece starts at zero
    learning_rate = 1e-3
    bracket = (1e-4, 1e-2)
    about = contracts.About(
        family="reparametrised",
        title="RandLoRA: full rank from shared random pieces",
        trains="two vectors per random piece and layer",
        formula="h = W x + s sum_i B_i diag(l_i) A_i diag(g_i) x, A and B random and shared",
        source="Albert et al. 2025, arXiv 2502.00987",
        sites=("linears",),
        text=(
            "VeRA weighs one random pair of matrices; this weighs as many as a full-rank update needs. Note that a "
            "smaller rank means more pieces, hence more parameters. The random matrices are drawn from the run's seed "
            "and not kept: the file holds the seed and a hash, so that another drawing is noticed. A trial where LoRA "
            "falls short of full fine-tuning."
        ),
        folklore=(("a smaller rank is a smaller adapter", "here it is the other way round: pieces = width / rank"),),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        alpha = options.alpha if options.alpha is not None else 20 * options.rank
        settings = {
            "r": options.rank,
            "randlora_alpha": alpha,
            "randlora_dropout": options.dropout,
            "save_projection": False,
        }
        return {**settings, "target_modules": options.target_modules}
