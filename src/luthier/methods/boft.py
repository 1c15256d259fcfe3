"""BOFT: rotations in a row, each over other blocks of inputs, and a factor for every output (Liu et al. 2311.06243)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """BOFT's settings."""

    block: int = Field(4, ge=2, le=1024, description="size of a rotation's blocks; it must divide the layers' inputs")
    butterflies: int = Field(
        1, ge=1, le=8, description="rotations in a row; from 2 on, plain PEFT needs its CUDA extension"
    )


class Boft(OnLinears):
    Options = Options
    kind = "BOFT"
    fresh = "exact"  # the rotations start at none
    learning_rate = 5e-4
    bracket = (5e-5, 5e-3)
    about = contracts.About(
        family="reparametrised",
        title="BOFT: small rotations in a row that reach far",
        trains="small rotations per group of inputs, and one factor per output",
        formula="h = s * (W R_1 R_2 ... R_m) x, each R orthogonal, in blocks of reordered inputs",
        source="Liu et al. 2023, arXiv 2311.06243",
        sites=("linears",),
        text=(
            "As in OFT, inputs are turned in blocks. Several rotations can follow each other, over inputs reordered in "
            "between as in a fast Fourier transform: small blocks then mix inputs that lie far apart. Each output also "
            "gets a factor. With one rotation, the default, it is OFT in small blocks with such factors. It is slow, "
            "as every step solves for its rotations and multiplies whole matrices."
        ),
        folklore=(
            (
                "orthogonal means that nothing is forgotten",
                "angles between neurons stay, outputs still change: measure the loss on unrelated text",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        settings = {"boft_block_size": options.block, "boft_n_butterfly_factor": options.butterflies}
        return {**settings, "target_modules": options.target_modules}
