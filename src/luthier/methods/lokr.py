"""LoKr: a Kronecker product of a small and a low-rank matrix as the update (Yeh et al. 2309.14859)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """LoKr's settings."""

    rank: int = Field(8, ge=1, le=512, description="width of the larger factor's update")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; default rank")
    factor: int = Field(-1, ge=-1, le=4096, description="size of the small factor; -1 splits the widths most evenly")


class Lokr(OnLinears):
    Options = Options
    kind = "LOKR"
    fresh = "exact"  # one factor starts at zero
    learning_rate = 3e-3
    bracket = (3e-4, 3e-2)
    about = contracts.About(
        family="reparametrised",
        title="LoKr: a Kronecker product as the update",
        trains="a small matrix and a low-rank one per linear layer",
        formula="h = (W + (alpha / r) C (x) (B A)) x, with (x) the Kronecker product",
        source="Yeh et al. 2023, arXiv 2309.14859; KronA, arXiv 2212.10650",
        sites=("linears",),
        text=(
            "A Kronecker product repeats one small pattern over the whole matrix, scaled by the entries of the other "
            "factor. Very few parameters give an update of full rank, which is good where files must be tiny and the "
            "change is regular. It wants a larger learning rate than LoRA."
        ),
        folklore=(
            (
                "few parameters learn little",
                "PEFT's comparison has 46.6 at 3e-3, close to LoRA's 47.4 and within the noise of one seed",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        alpha = options.alpha if options.alpha is not None else options.rank
        settings = {"r": options.rank, "alpha": alpha, "decompose_factor": options.factor}
        return {**settings, "target_modules": options.target_modules}
