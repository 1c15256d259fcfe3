"""BitFit: only biases learn (Ben Zaken et al. 2106.10199); where a base has none, zero ones are added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from luthier import contracts
from luthier.errors import SpecError


class Options(contracts.Options):
    """BitFit's settings."""

    add: Literal["auto", "never", "always"] = Field(
        "auto", description="zero biases for linears without one: auto adds them where the base has no bias at all"
    )
    linears: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="which linears inside the blocks may get a bias, by pattern: 'q_proj'"
    )


class BitFit(contracts.Method):
    Options = Options
    fresh = "exact"  # added biases start at zero
    learning_rate = 3e-3
    bracket = (1e-4, 1e-2)
    about = contracts.About(
        family="selective",
        title="BitFit: only the biases learn",
        trains="biases; zero ones are added where the base has none",
        formula="h = W x + b, only b learns",
        source="Ben Zaken et al. 2021, arXiv 2106.10199",
        sites=("biases",),
        text=(
            "Each linear layer may add a constant to its output, the bias, and only these constants learn. Llama, "
            "SmolLM2 and Gemma have no biases: there zero ones are added to every linear layer inside the blocks "
            "(155,520 numbers in SmolLM2-135M), which changes nothing until they learn; `add: never` refuses instead. "
            "Merged, the model's configuration says that it has biases (attention_bias, mlp_bias); an architecture "
            "without such a setting, such as Qwen3's and Gemma's feed-forward part, is served attached. No decay."
        ),
        folklore=(
            (
                "BitFit trains nothing on Llama",
                "true where biases are not added; here they are, and the report counts them",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Free all biases and add missing ones; SpecError where there is none and none may be added."""
        from luthier.adapt import blocks
        from luthier.adapt.freed import FreedAdapted

        own = [name for name, _ in model.named_parameters() if name.endswith("bias")]
        linears = {n: m for block in blocks.blocks(model) for n, m in block.linears.items()}
        bare = [name for name, module in linears.items() if getattr(module, "bias", None) is None]
        if self.options.linears != "all-linear":
            bare = blocks.choose(bare, self.options.linears, "method.linears")
        added = bare if self.options.add == "always" or (self.options.add == "auto" and not own) else []
        if not own and not added:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise SpecError(
                f"this model has no biases: {len(linears)} linear layers examined ({', '.join(kinds)})",
                where="method.add",
                remedy="`add: auto` adds zero biases that learn",
            )
        return FreedAdapted(model, own, added=[f"{name}.bias" for name in added])

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put saved biases on the model, adding those that were added."""
        from luthier.adapt import freed

        return freed.load(model, folder)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """No decay, as in the paper."""
        return {name: {"weight_decay": 0.0} for name in names}
