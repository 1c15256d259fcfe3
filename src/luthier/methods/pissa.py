"""PiSSA: LoRA that starts at the leading singular directions of every matrix (Meng et al. 2404.02948)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.adapt import door
from luthier.methods._linears import LinearOptions


class Options(LinearOptions):
    """PiSSA's settings."""

    rank: int = Field(16, ge=1, le=512, description="leading directions that learn; the file's LoRA has twice the rank")
    iterations: int | None = Field(16, ge=1, le=100, description="of the fast SVD; null takes the exact, slow one")


class Pissa(contracts.Method):
    Options = Options
    fresh = "tolerance"  # what learns and what it began as cancel up to rounding
    learning_rate = 2e-4
    bracket = (2e-5, 5e-4)
    about = contracts.About(
        family="reparametrised",
        title="PiSSA: LoRA from the leading singular directions",
        trains="two thin matrices A and B per linear layer",
        formula="h = W x + B A x - B0 A0 x, where A and B start as A0 and B0, the top r of W's SVD",
        source="Meng et al. 2024, arXiv 2404.02948",
        sites=("linears",),
        text=(
            "LoRA starts its update at nothing and in random directions; PiSSA lets the directions learn that matter "
            "most in the matrix already, and is often ahead after few steps. The paper replaces the base by what is "
            "left of it. Here the base stays as it is, and the start is subtracted: the file is an ordinary LoRA of "
            "twice the rank, which costs twice LoRA's work until it is merged. It wants a smaller learning rate than "
            "LoRA."
        ),
        folklore=(
            (
                "a PiSSA file is a LoRA file",
                "not as PEFT saves it by default: that file fits only the changed base. This one fits the base itself",
            ),
            ("PiSSA takes an SVD in every step", "one SVD per matrix, before the first step"),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh PiSSA on the model; SpecError where a layer is too narrow or is no plain matrix."""
        from luthier.adapt import halves

        options = self.options
        return halves.attach(
            model, rank=options.rank, target_modules=options.target_modules, iterations=options.iterations, seed=seed
        )

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay only what begins at zero or noise."""
        return door.undecayed(names)
