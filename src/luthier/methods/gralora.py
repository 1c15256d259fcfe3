"""GraLoRA: a small LoRA for every block of a matrix (Jung et al. 2505.20355)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """GraLoRA's settings."""

    rank: int = Field(32, ge=1, le=1024, description="width of all blocks' updates together; blocks must divide it")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; default 2 rank")
    blocks: int = Field(
        2, ge=1, le=64, description="the matrix is cut into this many parts each way; it must divide all widths"
    )


class GraLora(OnLinears):
    Options = Options
    kind = "GRALORA"
    fresh = "exact"  # every B starts at zero
    learning_rate = 1e-3
    bracket = (5e-5, 5e-3)
    about = contracts.About(
        family="reparametrised",
        title="GraLoRA: a small LoRA for every block",
        trains="two thin matrices per block of each matrix",
        formula="h = W x + (alpha / r) [B_ij A_ij] x, block by block",
        source="Jung et al. 2025, arXiv 2505.20355",
        sites=("linears",),
        text=(
            "A few inputs with huge activations can take over all of a LoRA's directions, the more so at high ranks. "
            "Cut into blocks, each with an update of its own, the matrix learns from them only where they are. "
            "Parameters are LoRA's; the update's rank grows with the number of blocks. Worth a trial at rank 32 and "
            "more."
        ),
        folklore=(
            (
                "LoRA fails at high ranks because it overfits",
                "often because outliers in the inputs steer the whole update, which blocks prevent",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        alpha = options.alpha if options.alpha is not None else 2 * options.rank
        settings = {"r": options.rank, "alpha": alpha, "gralora_k": options.blocks}
        return {**settings, "target_modules": options.target_modules}
