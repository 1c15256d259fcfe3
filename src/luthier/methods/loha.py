"""LoHa: the elementwise product of two low-rank updates (Hyeon-Woo et al. 2108.06098)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """LoHa's settings."""

    rank: int = Field(8, ge=1, le=512, description="width of both updates; their product has up to its square")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; default rank")


class Loha(OnLinears):
    Options = Options
    kind = "LOHA"
    fresh = "exact"  # one of the four starts at zero
    learning_rate = 1e-3
    bracket = (1e-4, 1e-2)
    about = contracts.About(
        family="reparametrised",
        title="LoHa: two low-rank updates, multiplied entry by entry",
        trains="four thin matrices per linear layer",
        formula="h = (W + (alpha / r) (B1 A1) * (B2 A2)) x",
        source="Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS, arXiv 2309.14859",
        sites=("linears",),
        text=(
            "Multiplying two updates of rank r entry by entry gives one of rank up to r squared, for the parameters of "
            "2 r. It was made to send less between machines, and became popular for pictures. For text it is worth a "
            "trial where LoRA's rank seems to be what limits; every step builds whole matrices, so it is slower."
        ),
        folklore=(
            (
                "more rank per parameter means better answers",
                "which layers are tuned and the learning rate decide first; compare at each one's own best rate",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        alpha = options.alpha if options.alpha is not None else options.rank
        return {"r": options.rank, "alpha": alpha, "target_modules": options.target_modules}
