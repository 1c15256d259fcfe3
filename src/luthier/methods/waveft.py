"""WaveFT: a few wavelet coefficients of the update learn (Bilican et al. 2505.12532)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """WaveFT's settings."""

    coefficients: int = Field(1000, ge=1, le=1_000_000, description="numbers that learn per layer")
    scale: float = Field(25.0, gt=0, le=10_000, description="the update is scaled by this")


class WaveFt(OnLinears):
    Options = Options
    kind = "WAVEFT"
    fresh = "exact"  # the coefficients start at zero
    learning_rate = 3e-3
    bracket = (1e-4, 3e-2)
    about = contracts.About(
        family="reparametrised",
        title="WaveFT: a few wavelets of the update",
        trains="a thousand numbers per linear layer",
        formula="h = (W + s IDWT(C)) x, C sparse at fixed random places",
        source="Bilican et al. 2025, arXiv 2505.12532",
        sites=("linears",),
        text=(
            "As FourierFT, with wavelets in place of waves: each learned number changes a small patch of the matrix "
            "and not all of it, so that they hinder each other less. The places are drawn from the run's seed and not "
            "kept: the file holds the seed and a hash, so that another drawing is noticed. The number of parameters "
            "can be set freely, down to a few per layer."
        ),
        folklore=(
            (
                "sparse in a transform is sparse in the weights",
                "each number changes a patch, and hundreds of patches cover much of the matrix",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        settings = {"n_frequency": options.coefficients, "scaling": options.scale}
        return {**settings, "target_modules": options.target_modules}
