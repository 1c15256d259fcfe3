"""MiSS: one thin matrix, shared by groups of inputs (Kang & Yin 2409.15371)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """MiSS's settings."""

    rank: int = Field(32, ge=1, le=1024, description="number of groups that the inputs are summed in")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the update's input; under sharing exact in expectation")


class Miss(OnLinears):
    Options = Options
    kind = "MISS"
    fresh = "exact"  # D starts at zero
    learning_rate = 1e-3
    bracket = (5e-5, 5e-3)
    about = contracts.About(
        family="reparametrised",
        title="MiSS: one thin matrix over sums of inputs",
        trains="one thin matrix per linear layer",
        formula="h = W x + D sum_g(x), with sum_g the sums over groups of inputs",
        source="Kang and Yin 2024, arXiv 2409.15371 (earlier: Bone)",
        sites=("linears",),
        text=(
            "Where LoRA learns which directions of the input to look at, MiSS fixes them: inputs are summed in groups, "
            "and one matrix learns what each sum adds to the output. That is half of LoRA's parameters at equal rank, "
            "nothing random, and fast. A simple rival to try beside LoRA."
        ),
        folklore=(
            (
                "an update needs two matrices",
                "with inputs summed by a fixed rule one is enough, and it starts at zero without any drawing",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        return {"r": options.rank, "miss_dropout": options.dropout, "target_modules": options.target_modules}
