"""RoAd: outputs are turned in pairs and scaled (Liao & Monz 2409.00119)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from luthier import contracts
from luthier.methods._linears import LinearOptions, OnLinears


class Options(LinearOptions):
    """RoAd's settings."""

    variant: Literal["road_1", "road_2", "road_4"] = Field(
        "road_1", description="one, two or four times as many angles and lengths as pairs of outputs"
    )


class Road(OnLinears):
    Options = Options
    kind = "ROAD"
    fresh = "exact"  # angles start at zero, lengths at one
    learning_rate = 1e-3
    bracket = (1e-4, 1e-2)
    about = contracts.About(
        family="reparametrised",
        title="RoAd: turn outputs in pairs",
        trains="one angle and one length per pair of outputs",
        formula="h = R W x, with R = a [cos t, -sin t; sin t, cos t] for each pair",
        source="Liao and Monz 2024, arXiv 2409.00119",
        sites=("linears",),
        text=(
            "The outputs of every layer are taken in pairs, and each pair is turned and stretched. That is hardly more "
            "parameters than (IA)^3, costs a few multiplications, and different people's adapters can run side by side "
            "in one batch. It folds into the weights."
        ),
        folklore=(
            (
                "rotating outputs is the same as OFT",
                "OFT turns inputs in large blocks; this turns outputs two by two and stretches them as well",
            ),
        ),
    )

    def settings(self) -> dict[str, Any]:
        """The options under PEFT's names."""
        return {"variant": self.options.variant, "target_modules": self.options.target_modules}
