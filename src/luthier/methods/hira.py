"""HiRA: the base's own matrix, scaled entry by entry by a low-rank one (Huang et al., ICLR 2025)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """HiRA's settings."""

    rank: int = Field(32, ge=1, le=1024, description="width of the scaling matrix")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the update's input; under sharing exact in expectation")


class Hira(OnLinears):
    Options = Options
    kind = "HIRA"
    fresh = "exact"  # B starts at zero
    learning_rate = 4.5e-3
    bracket = (3e-4, 3e-2)
    about = contracts.About(
        family="reparametrised",
        title="HiRA: scale the base entry by entry",
        trains="two thin matrices A and B per linear layer",
        formula="h = (W + W * (B A)) x",
        source="Huang et al. 2025, ICLR, openreview TwJrTz9cRS",
        sites=("linears",),
        text=(
            "The update is the base's matrix multiplied entry by entry with a low-rank one: its rank is as high as the "
            "base's, for LoRA's parameters. As weights are small, so is the update, and the learning rate must be some "
            "times LoRA's. Each step builds whole matrices."
        ),
        folklore=(
            (
                "at LoRA's learning rate it is weak",
                "it is: PEFT's comparison has 51.3 at 4.5e-3, the best there next to rsLoRA, one seed",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        return {"r": options.rank, "hira_dropout": options.dropout, "target_modules": options.target_modules}
