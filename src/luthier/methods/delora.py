"""DeLoRA: a low-rank update whose strength has a bound of its own (Bini et al. 2503.18225)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """DeLoRA's settings."""

    rank: int = Field(16, ge=1, le=1024, description="width of the update")
    bound: float = Field(15.0, gt=0, le=1000, description="strength that the update starts with; it learns too")


class Delora(OnLinears):
    Options = Options
    kind = "DELORA"
    fresh = "exact"  # B starts at zero
    learning_rate = 1e-3
    bracket = (1e-4, 1e-2)
    about = contracts.About(
        family="reparametrised",
        title="DeLoRA: direction and strength apart",
        trains="two thin matrices and one strength per linear layer",
        formula="h = W x + (l / r) B E A (||w|| * x), E makes each direction one long",
        source="Bini et al. 2025, arXiv 2503.18225",
        sites=("linears",),
        text=(
            "Every direction of the update is brought to length one, and a single number per layer says how strong all "
            "of them are together. So the update cannot run away, whatever the learning rate or the length of "
            "training: a robust choice where runs diverge or are long. Steps are a little slower than LoRA's."
        ),
        folklore=(
            (
                "a bound costs quality",
                "it bounds how far weights may move, which LoRA leaves to the learning rate and to luck",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        return {"r": options.rank, "delora_lambda": options.bound, "target_modules": options.target_modules}
