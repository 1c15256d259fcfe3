"""P-tuning: a prompt that a small network makes while it is learned (Liu et al. 2103.10385)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from luthier import contracts

KIND = "P_TUNING"


class Options(contracts.Options):
    """P-tuning's settings."""

    tokens: int = Field(20, ge=1, le=1024, description="length of the prompt; each one costs as much as a token")
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="the network that makes the prompt of its anchors")
    width: int | None = Field(None, ge=1, le=16_384, description="of the network; by default the base's own")


class PTuning(contracts.Method):
    Options = Options
    fresh = "changes: tokens that were not there, and that mean nothing yet, stand before every row"
    not_merged = "a prompt is input, not weights"
    learning_rate = 1e-3
    bracket = (1e-4, 5e-3)
    about = contracts.About(
        family="additive",
        title="P-tuning: a prompt that a small network makes",
        trains="anchors and a network that turns them into a prompt; only the prompt is kept",
        formula="h_0 = [f(anchors); E(x)], f an MLP or an LSTM",
        source="Liu et al. 2021, arXiv 2103.10385",
        sites=("soft_tokens",),
        text=(
            "Prompt tuning whose rows are not learned one by one but made by a network that learns, so that they move "
            "together and at an ordinary learning rate. The network is thrown away after training: the folder holds "
            "the prompt alone, on a small base about a hundredth of what was trained. It starts from noise, and so "
            "changes the base's answers from the first step on."
        ),
        folklore=(
            (
                "what trains is what is kept",
                "here a million numbers train and some ten thousand are kept",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh encoder's prompt before the input; SpecError for a base that does not take embeddings."""
        from peft.tuners.p_tuning import PromptEncoder

        from luthier.adapt import prompts

        width = self.options.width or model.get_input_embeddings().weight.shape[1]
        settings = {"encoder_reparameterization_type": self.options.encoder.upper(), "encoder_hidden_size": width}

        def make(config: Any, shape: prompts.Shape) -> prompts.Encoded:
            return prompts.Encoded(PromptEncoder(config), shape.tokens)

        return prompts.attach(model, KIND, self.options.tokens, make, seed=seed, **settings)

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put a saved prompt on the model; its encoder is gone, its rows can be learned on."""
        from luthier.adapt import prompts

        return prompts.load(model, folder, KIND)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """The network's values are not what is kept: no decay."""
        return {name: {"weight_decay": 0.0} for name in names}
