"""HRA: a chain of learned reflections before every layer (Yuan et al. 2405.17484)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """HRA's settings."""

    rank: int = Field(4, ge=2, le=512, multiple_of=2, description="number of reflections, even: pairs cancel at first")


class Hra(OnLinears):
    Options = Options
    kind = "HRA"
    fresh = "tolerance"  # pairs of equal reflections cancel up to rounding
    learning_rate = 1e-3
    bracket = (1e-4, 1e-2)
    about = contracts.About(
        family="reparametrised",
        title="HRA: reflections before every layer",
        trains="one vector per reflection",
        formula="h = W (1 - 2 u_1 u_1^T) ... (1 - 2 u_r u_r^T) x, each u of length one",
        source="Yuan et al. 2024, arXiv 2405.17484",
        sites=("linears",),
        text=(
            "A reflection in a mirror is the simplest orthogonal map, and a chain of them is both a rotation of the "
            "inputs, as in OFT, and a change of low rank, as in LoRA. At first the mirrors stand in pairs that cancel. "
            "A middle way between the two families, with few parameters. Its steps are slow and take memory: PEFT "
            "multiplies whole matrices, one reflection after the other."
        ),
        folklore=(
            (
                "low-rank and orthogonal methods exclude each other",
                "r reflections change W by a matrix of rank r, and are orthogonal",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        return {"r": self.options.rank, "target_modules": self.options.target_modules}
