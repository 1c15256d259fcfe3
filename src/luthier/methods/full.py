"""Full fine-tuning: every weight learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier import contracts


class Options(contracts.Options):
    """Full fine-tuning has no settings of its own."""


class Full(contracts.Method):
    Options = Options
    fresh = "exact"
    learning_rate = 5e-5
    bracket = (2e-6, 5e-4)
    about = contracts.About(
        family="full",
        title="full fine-tuning: every weight learns",
        trains="all weights",
        formula="W' = W + dW, for every W",
        source="the yardstick; learning rates as in Hu et al. 2021, arXiv 2106.09685, section 5",
        sites=("all",),
        text=(
            "Nothing is frozen. It needs the most memory (weights, gradients and two moments for each number) and "
            "leaves a file as large as the model, which serves this one task only. Take it as the yardstick, for "
            "small models, or where the task is far from what the base knows: on code and mathematics it learns more "
            "than low-rank updates, and forgets more. A head that is tied to the embedding stays tied. Larger models "
            "want smaller learning rates: 5e-4 is the upper end for a hundred million weights, 1e-5 usual for some "
            "billions."
        ),
        folklore=(
            (
                "full tuning is always the best",
                "on small instruction sets low-rank updates come as close as seeds let one see; compare on your task",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Free every parameter; SpecError on a quantised base."""
        from luthier.adapt.freed import FreedAdapted

        return FreedAdapted(model, [name for name, _ in model.named_parameters()])

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put saved weights on the model."""
        from luthier.adapt import freed

        return freed.load(model, folder)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay pulls matrices towards zero; gains and biases have no reason to go there."""
        return {name: {"weight_decay": 0.0} for name in names if name.endswith("bias") or "norm" in name}
