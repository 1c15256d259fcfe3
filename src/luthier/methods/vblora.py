"""VB-LoRA: LoRA's matrices mixed from one bank of vectors (Li et al. 2405.15179)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """VB-LoRA's settings."""

    rank: int = Field(4, ge=1, le=512, description="width of the update")
    vectors: int = Field(256, ge=2, le=8192, description="vectors in the bank that all layers share")
    length: int | None = Field(None, ge=1, le=65_536, description="of a vector; it must divide all widths; else found")


class VbLora(OnLinears):
    Options = Options
    kind = "VBLORA"
    fresh = "changes: all parts are mixed from one bank that is drawn at random, so the update is small but not zero"
    learning_rate = 1e-2
    bracket = (1e-3, 1e-1)
    about = contracts.About(
        family="reparametrised",
        title="VB-LoRA: all layers share one bank of vectors",
        trains="a bank of vectors, and how each layer mixes them",
        formula="h = W x + B A x, rows of A and B are mixtures of two vectors of the bank",
        source="Li et al. 2024, arXiv 2405.15179",
        sites=("linears",),
        text=(
            "LoRA's matrices are cut into pieces, and each piece is a mixture of the two best vectors of a bank that "
            "all layers share. What is trained is mostly the choice; what must be kept is little. It starts close to "
            "the base, not at it, as a bank of zeros could not learn."
        ),
        folklore=(
            (
                "trained and kept are the same number",
                "the mixing weights of all vectors are trained, and only those of the two best matter afterwards",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        settings = {"r": options.rank, "num_vectors": options.vectors}
        settings |= {} if options.length is None else {"vector_length": options.length}
        return {**settings, "target_modules": options.target_modules}
