"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products (Karimi Mahabadi et al. 2106.04647)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from luthier import contracts


class Options(contracts.Options):
    """Compacter's settings."""

    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer",
        description="pfeiffer is the paper's Compacter++, houlsby its Compacter; or beside the MLP: parallel",
    )
    size: int = Field(64, ge=1, le=16_384, description="width of the bottleneck; a multiple of n")
    n: int = Field(4, ge=1, le=64, description="Kronecker products per matrix; divides size and the model's width")
    rank: int = Field(1, ge=1, le=64, description="rank of each product's large factor")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("gelu", description="the non-linearity in the middle")
    scale: float = Field(1.0, gt=0, le=1000, description="factor of the update")
    dropout: float = Field(0.0, ge=0, lt=1, description="in the bottleneck; under sharing exact in expectation")
    layers: list[int] | None = Field(
        None, min_length=1, description="blocks that get one, counted from 0, or from -1 at the top; default all"
    )


class Compacter(contracts.Method):
    Options = Options
    fresh = "exact"  # the right factors of U start at zero
    not_merged = "its non-linear layer cannot be held by a matrix of the base"
    learning_rate = 3e-3
    bracket = (3e-4, 3e-2)
    about = contracts.About(
        family="additive",
        title="Compacter: bottleneck adapters made of Kronecker products",
        trains="low-rank factors per block and n small matrices shared by all blocks",
        formula="h = h + s U act(D h); U, D = sum over i of A_i kron (l_i r_i), the A_i shared",
        source="Karimi Mahabadi et al. 2021, arXiv 2106.04647",
        sites=("after_attention", "after_mlp", "beside_mlp"),
        text=(
            "A bottleneck adapter whose two matrices are not stored but composed: n small n x n matrices, shared by "
            "the whole model, are each multiplied (Kronecker) with a low-rank factor of the block's own, and summed. "
            "A block pays for the sum of its widths instead of their product, some forty times less than a plain "
            "bottleneck. Take it where many adapters must be kept small; it costs a plain bottleneck's time."
        ),
        folklore=(
            (
                "fewer trained numbers make training faster",
                "each matrix is built in full at every pass; what shrinks is the file and the optimiser's state",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Hang fresh adapters on the blocks; SpecError where n does not divide the widths."""
        from luthier.adapt import beside

        options = self.options.model_dump()
        return beside.attach(model, beside.Shape(terms=options.pop("n"), **options), seed=seed)

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put saved adapters on the model, of whatever shape the folder holds."""
        from luthier.adapt import beside

        return beside.load(model, folder)
