"""LLaMA-Adapter: gated prompts in the attention of the upper layers (Zhang et al. 2303.16199)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from luthier import contracts


class Options(contracts.Options):
    """LLaMA-Adapter's settings; the paper takes 10 tokens in the upper 30 of 32 layers."""

    length: int = Field(10, ge=1, le=4096, description="learned tokens per layer")
    layers: int | None = Field(None, ge=1, description="how many layers from the top; default all but the lowest two")


class LlamaAdapter(contracts.Method):
    Options = Options
    fresh = "exact"  # the gates start at zero
    not_merged = "what a prompt adds depends on each token's query, so no matrix of the base can hold it"
    learning_rate = 5e-3
    bracket = (5e-4, 5e-2)
    about = contracts.About(
        family="additive",
        title="LLaMA-Adapter: gated prompts in the attention of the upper layers",
        trains="a few learned tokens and one gate per layer",
        formula="h = attn(x) + W_o (g softmax(q K_p' / sqrt(d)) V_p), K_p = W_k p, V_p = W_v p",
        source="Zhang et al. 2023, arXiv 2303.16199",
        sites=("attention_gate",),
        text=(
            "In each of the upper layers every token also attends to a few learned ones, apart from the text: with a "
            "softmax of their own, whose result is multiplied by a learned gate. The gate starts at zero, so the first "
            "steps do not disturb what the model knows, as prompts drawn at random otherwise do. It takes no place in "
            "the context. Only for models with Llama's, Mistral's or GPT-2's attention."
        ),
        folklore=(
            (
                "a learned prompt is a learned prompt",
                "prompt tuning lengthens the input and shares one softmax with it; here the text's own attention stays "
                "as it was, and the prompt's part is switched in by a gate",
            ),
            (
                "LLaMA-Adapter is weak",
                "its learning rate decides: 21.2 % at 5e-4 against 38.4 % at 5e-3 in PEFT's comparison",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Wrap the upper attentions through PEFT; SpecError where its implementation does not fit the model."""
        from luthier.adapt import gated

        return gated.attach(model, length=self.options.length, layers=self.options.layers, seed=seed)

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put saved prompts on the model."""
        from luthier.adapt import gated

        return gated.load(model, folder)
