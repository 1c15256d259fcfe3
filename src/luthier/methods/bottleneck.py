"""Bottleneck adapters: small non-linear layers inside every block (Houlsby 1902.00751, Pfeiffer, parallel)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from luthier import contracts

PARALLEL_SCALE = 4.0  # what He et al. 2110.04366 found best beside the MLP


class Options(contracts.Options):
    """The adapter's settings, in the literature's terms."""

    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer", description="after attention and MLP (houlsby), after the MLP (pfeiffer), beside the MLP (parallel)"
    )
    size: int = Field(64, ge=1, le=16_384, description="width of the bottleneck; 16 to 64 serial, 32 to 512 parallel")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="the non-linearity in the middle")
    scale: float | None = Field(None, gt=0, le=1000, description="factor of the update; default 1, parallel 4")
    dropout: float = Field(0.0, ge=0, lt=1, description="in the bottleneck; under sharing exact in expectation")
    layers: list[int] | None = Field(
        None, min_length=1, description="blocks that get one, counted from 0, or from -1 at the top; default all"
    )


class Bottleneck(contracts.Method):
    Options = Options
    fresh = "exact"  # U starts at zero
    not_merged = "its non-linear layer cannot be held by a matrix of the base"
    learning_rate = 1e-3
    bracket = (1e-4, 3e-3)
    about = contracts.About(
        family="additive",
        title="Bottleneck adapters: a small non-linear layer inside every block",
        trains="two thin matrices with biases per block, or two pairs",
        formula="h = h + s U act(D h); parallel: h = f(x) + s U act(D x)",
        source="Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, 2005.00247; He et al. 2021, 2110.04366",
        sites=("after_attention", "after_mlp", "beside_mlp"),
        text=(
            "Inside each block the states pass through a narrow layer: down to a few dozen channels, through a "
            "non-linearity, up again, and the result is added before the residual sum. U starts at zero, so training "
            "starts from the base. Houlsby puts one after the attention and one after the MLP, Pfeiffer one after "
            "the MLP for half the cost, the parallel form one beside the MLP, from the same input. Take it where an "
            "adapter may stay apart from its base: it cannot be folded into the weights and is run at every answer."
        ),
        folklore=(
            (
                "an adapter is an output layer on top",
                "that is a head or a probe; an adapter sits inside every block, before the residual sum",
            ),
            (
                "an adapter this small costs nothing when the model answers",
                "on a GPU it added 20.7 % (after the MLP) or 30.3 % (both places) to the latency of one input of 128 "
                "tokens, since small layers wait in line; 2.2 and 3.0 % at 32 inputs of 512 tokens",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Hang fresh bottlenecks on the blocks; SpecError names layers that the model lacks."""
        from luthier.adapt import beside

        options = self.options.model_dump()
        if options["scale"] is None:
            options["scale"] = PARALLEL_SCALE if options["placement"] == "parallel" else 1.0
        return beside.attach(model, beside.Shape(**options), seed=seed)

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put saved bottlenecks on the model, of whatever shape the folder holds."""
        from luthier.adapt import beside

        return beside.load(model, folder)
