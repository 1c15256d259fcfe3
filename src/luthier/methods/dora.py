"""DoRA: LoRA for the direction of each output's weights, and a number for their length (Liu et al. 2402.09353)."""

from __future__ import annotations

from typing import Any

from luthier import contracts
from luthier.methods._linears import OnLinears, RankOptions


class Options(RankOptions):
    """DoRA's settings."""


class Dora(OnLinears):
    Options = Options
    kind = "LORA"
    fresh = "tolerance"  # the lengths are divided out and multiplied in again
    learning_rate = 5e-4
    bracket = (5e-5, 1e-3)
    about = contracts.About(
        family="reparametrised",
        title="DoRA: direction by LoRA, length by a number",
        trains="two thin matrices per linear layer, and one length per output",
        formula="h = m * (W + s B A) / ||W + s B A|| x",
        source="Liu et al. 2024, arXiv 2402.09353",
        sites=("linears",),
        text=(
            "Every output of a layer has a row of weights: a direction and a length. LoRA turns the directions, and a "
            "learned number per output sets the length, so the two no longer have to move together. It is slower than "
            "LoRA, as the rows' lengths are computed anew in every step, and helps most at low ranks."
        ),
        folklore=(
            (
                "DoRA is always better than LoRA",
                "the paper has 78.4 against 74.7 on commonsense with LLaMA-7B; PEFT's comparison on mathematics has no "
                "gain and 26 % more time",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        return {**self.options.lora(), "use_dora": True}
