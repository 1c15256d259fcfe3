"""Diff pruning: a difference for every weight and a gate that learns which to keep (Guo et al. 2012.07463)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from luthier import contracts


class Options(contracts.Options):
    """Diff pruning's settings."""

    share: float = Field(0.005, gt=0, le=0.5, description="of the matrices' entries that may end up changed")
    pressure: float = Field(100.0, gt=0, description="weight of the share of open gates that is too many, in the loss")
    gate_scale: float = Field(100.0, gt=0, description="the gates' learning rate as a multiple of the differences'")
    linears: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="matrices inside the blocks that may change, by pattern: '*.mlp.*'"
    )


class DiffPruning(contracts.Method):
    Options = Options
    fresh = "exact"  # differences start at zero
    learning_rate = 1e-3
    bracket = (5e-5, 5e-3)
    about = contracts.About(
        family="selective",
        title="diff pruning: learns which few weights to change, and how",
        trains="a difference and a gate for every entry, twice the matrices' size",
        formula="W' = W + z * d, z a hard-concrete gate, loss + pressure * max(0, E[share of z > 0] - allowed)",
        source="Guo et al. 2020, arXiv 2012.07463; gates: Louizos et al. 2017, arXiv 1712.01312",
        sites=("sparse_weights",),
        text=(
            "Every entry of the blocks' matrices gets a difference and a gate between 0 and 1. The gates are noisy "
            "while training, so that the loss tells what closing one would cost, and a penalty closes them until no "
            "more than the target share is expected open. After 60 % of the steps the largest differences of that "
            "share are chosen for good and learn on alone. It trains 200 % of the matrices' numbers, changes 0.5 % of "
            "them, and keeps eight bytes for each: the most expensive way to a small file, in memory above full "
            "tuning. It wants some hundred steps for the gates to close. FishMask fixes its mask first and costs far "
            "less."
        ),
        folklore=(("few trainable parameters and few changed ones are the same", "here 200 % train and 0.5 % change"),),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put differences and gates on the matrices inside the blocks."""
        from luthier.adapt import delta
        from luthier.adapt.hard_concrete import GatedAdapted, Sparsity

        options = self.options
        layers = delta.candidates(model, options.linears, "method.linears")
        sparsity = Sparsity(options.share, options.pressure)
        return GatedAdapted(model, layers, sparsity, seed=seed)

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put a saved sparse change on the model."""
        from luthier.adapt import delta

        return delta.load(model, folder)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Gates walk from open to shut, some five units, in the steps of a run, and are not pulled by decay."""
        gate = {"lr_scale": self.options.gate_scale, "weight_decay": 0.0}
        return {name: gate for name in names if name.endswith(".gates")}
