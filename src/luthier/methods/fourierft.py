"""FourierFT: a few frequencies of the update learn (Gao et al. 2405.03003)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """FourierFT's settings."""

    frequencies: int = Field(1000, ge=1, le=1_000_000, description="numbers that learn per layer")
    scale: float = Field(150.0, gt=0, le=10_000, description="the update is scaled by this")


class FourierFt(OnLinears):
    Options = Options
    kind = "FOURIERFT"
    fresh = "exact"  # the spectrum starts at zero; the paper draws it at random
    learning_rate = 3e-2
    bracket = (1e-3, 3e-1)
    about = contracts.About(
        family="reparametrised",
        title="FourierFT: a few frequencies of the update",
        trains="a thousand numbers per linear layer, at any width",
        formula="h = (W + s real(IFFT2(F))) x, F sparse at fixed random places",
        source="Gao et al. 2024, arXiv 2405.03003",
        sites=("linears",),
        text=(
            "The update is written as a sum of waves over the matrix, and a fixed random choice of them learns. The "
            "number of parameters does not grow with the layers' width, so files stay tiny for large bases. The places "
            "are drawn from the run's seed and not kept: the file holds the seed and a hash, so that another drawing "
            "is noticed. Each step runs a Fourier transform per layer; it wants a very large learning rate."
        ),
        folklore=(
            (
                "the parameter count says how fast it trains",
                "whole matrices are built in every step: with a tenth of LoRA's parameters it is slower than LoRA",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        settings = {"n_frequency": options.frequencies, "scaling": options.scale, "init_weights": True}
        return {**settings, "target_modules": options.target_modules}
