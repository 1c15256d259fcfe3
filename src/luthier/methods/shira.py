"""SHiRA: a sparse update at randomly chosen entries (Bhardwaj et al. 2406.13175)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """SHiRA's settings."""

    rank: int = Field(16, ge=1, le=1024, description="as many entries learn as a LoRA of this rank has parameters")


class Shira(OnLinears):
    Options = Options
    kind = "SHIRA"
    fresh = "exact"  # the entries change by nothing at first
    learning_rate = 1e-3
    bracket = (1e-4, 1e-2)
    about = contracts.About(
        family="selective",
        title="SHiRA: a few random entries of every matrix",
        trains="as many entries of each matrix as a LoRA of that rank has",
        formula="h = (W + S) x, S sparse at fixed random places",
        source="Bhardwaj et al. 2024, arXiv 2406.13175",
        sites=("sparse_weights",),
        text=(
            "One or two of a hundred entries of each matrix are drawn once and learn, all others stay. The update has "
            "a high rank for few parameters, two such adapters seldom touch the same entries, and the file holds the "
            "places and their changes. No data is needed to choose, unlike FishMask."
        ),
        folklore=(
            (
                "one must choose the entries with care",
                "at random it reaches 51.0 in PEFT's comparison, above LoRA's 47.4 there, one seed",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        return {"r": self.options.rank, "target_modules": self.options.target_modules}
