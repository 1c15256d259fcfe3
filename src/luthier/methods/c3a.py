"""C3A: circular convolutions as the update (Chen et al. 2407.19342)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """C3A's settings."""

    block: int | None = Field(
        None, ge=1, le=65_536, description="length of a convolution; it must divide all widths; else found"
    )


class C3a(OnLinears):
    Options = Options
    kind = "C3A"
    fresh = "exact"  # the kernels start at zero; PEFT's default draws them
    learning_rate = 5e-2
    bracket = (1e-3, 0.9)
    about = contracts.About(
        family="reparametrised",
        title="C3A: circular convolutions as the update",
        trains="one kernel per block of the matrix",
        formula="h = W x + conv(x, k), circular, block by block",
        source="Chen et al. 2024, arXiv 2407.19342",
        sites=("linears",),
        text=(
            "The update is cut into blocks, and each is a circulant matrix: one row, shifted by one place in every "
            "next row. A fast Fourier transform multiplies by it without building it. Long blocks mean few parameters, "
            "and the update's rank is not bounded by their number. It wants a learning rate far above any other's."
        ),
        folklore=(
            (
                "a rate of 0.3 must be a misprint",
                "PEFT's comparison reaches 48.7 with it, above LoRA's 47.4 there, one seed",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        settings = {} if options.block is None else {"block_size": options.block}
        return {**settings, "target_modules": options.target_modules}
