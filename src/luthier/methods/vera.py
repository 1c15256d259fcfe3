"""VeRA: two random matrices shared by all layers, and two vectors that learn (Kopiczko et al. 2310.11454)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """VeRA's settings."""

    rank: int = Field(
        256, ge=1, le=8192, description="width of the shared random matrices; it costs no parameters to speak of"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the update's input; under sharing exact in expectation")


class Vera(OnLinears):
    Options = Options
    kind = "VERA"
    fresh = "exact"  # b starts at zero
    learning_rate = 5e-3
    bracket = (1e-3, 5e-2)
    about = contracts.About(
        family="reparametrised",
        title="VeRA: vectors beside shared random matrices",
        trains="two vectors per linear layer",
        formula="h = W x + diag(b) B diag(d) A x, A and B random and shared",
        source="Kopiczko et al. 2023, arXiv 2310.11454",
        sites=("linears",),
        text=(
            "All layers share one pair of random matrices that never learn; each layer has two vectors that weigh "
            "their rows. That is a tenth of LoRA's parameters or less. The random matrices are drawn from the run's "
            "seed and not kept: the file holds the seed and a hash, so that another drawing is noticed. Where you keep "
            "one adapter for each of many people, this is the one to try; it wants a large learning rate."
        ),
        folklore=(
            (
                "VeRA's files are tiny",
                "only when the random matrices are not written: PEFT's comparison stored them, 6.8 MB for 0.13 million "
                "parameters",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        options = self.options
        settings = {"r": options.rank, "vera_dropout": options.dropout, "save_projection": False}
        return {**settings, "target_modules": options.target_modules}
