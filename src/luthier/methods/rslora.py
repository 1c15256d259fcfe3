"""rsLoRA: LoRA scaled by alpha / sqrt(rank), so that high ranks learn (Kalajdzievski 2312.03732)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import OnLinears, RankOptions


class Options(RankOptions):
    """rsLoRA's settings."""

    rank: int = Field(64, ge=1, le=1024, description="width of the update; pays from 32 on")
    alpha: float | None = Field(
        None, gt=0, description="the update is scaled by alpha / sqrt(rank); default sqrt(rank) 2"
    )


class RsLora(OnLinears):
    Options = Options
    kind = "LORA"
    fresh = "exact"  # B starts at zero
    learning_rate = 3e-4
    bracket = (3e-5, 1e-3)
    about = contracts.About(
        family="reparametrised",
        title="rsLoRA: LoRA with a scale that suits high ranks",
        trains="two thin matrices A and B per linear layer",
        formula="h = W x + (alpha / sqrt(r)) B A x",
        source="Kalajdzievski 2023, arXiv 2312.03732",
        sites=("linears",),
        text=(
            "LoRA divides its update by the rank, and so the wider the update, the less each direction can learn. "
            "Dividing by the square root keeps the size of a step the same at any rank. Take it when the rank is 32 or "
            "more; at small ranks it is LoRA with a larger alpha."
        ),
        folklore=(
            (
                "a higher rank does not help",
                "with LoRA's scale it hardly can: at rank 64 PEFT's comparison has 47.4 with alpha / r and 51.3 with "
                "alpha / sqrt(r), one seed each",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        scale = self.options.alpha if self.options.alpha is not None else 2 * self.options.rank**0.5
        return {**self.options.lora(), "lora_alpha": scale, "use_rslora": True}
