"""LoRA+: LoRA whose B learns faster than its A (Hayou et al. 2402.12354)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import OnLinears, RankOptions


class Options(RankOptions):
    """LoRA+'s settings."""

    ratio: float = Field(16.0, ge=1, le=1000, description="B's learning rate is this many times A's")


class LoraPlus(OnLinears):
    Options = Options
    kind = "LORA"
    fresh = "exact"  # B starts at zero
    learning_rate = 4e-4
    bracket = (3e-5, 2e-3)
    about = contracts.About(
        family="reparametrised",
        title="LoRA+: LoRA whose second matrix learns faster",
        trains="two thin matrices A and B per linear layer",
        formula="h = W x + (alpha / r) B A x, with step(B) = ratio * step(A)",
        source="Hayou et al. 2024, arXiv 2402.12354",
        sites=("linears",),
        text=(
            "B starts at zero and A does not, so one learning rate cannot suit both in wide networks: A is the inside "
            "of the update, B its outside. Here the task's learning rate is A's, and B's is a multiple of it. Choose "
            "about half of LoRA's learning rate. It often gets to the same loss in fewer steps, and needs its own "
            "search to show it."
        ),
        folklore=(
            (
                "LoRA+ is another adapter",
                "it is LoRA with two learning rates: the file is a LoRA file and every server reads it",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        return {**self.options.lora()}

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Give every B the ratio; A keeps the task's learning rate."""
        return {name: {"lr_scale": self.options.ratio} for name in names if "lora_B" in name}
