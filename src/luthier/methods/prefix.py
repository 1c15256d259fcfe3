"""Prefix tuning: learned keys and values before those of every layer (Li and Liang 2101.00190)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._start import StartOptions

KIND = "PREFIX_TUNING"


class Options(StartOptions):
    """Prefix tuning's settings."""

    tokens: int = Field(16, ge=1, le=1024, description="length of the prefix; beyond some thirty it rarely helps")
    projection: int | None = Field(
        None, ge=1, le=16_384, description="let a network of this width make the prefix while training; not kept"
    )


class Prefix(contracts.Method):
    Options = Options
    fresh = "changes: every layer sees a few tokens that were not there; the base answers as if it had read them"
    not_merged = "a prefix is what attention looks at, not weights"
    learning_rate = 1e-2
    bracket = (1e-3, 5e-2)  # twenty steps on SmolLM2 fell fastest above the usual 1e-2
    about = contracts.About(
        family="additive",
        title="Prefix tuning: learned keys and values in every layer",
        trains="k keys and values per layer",
        formula="attention(q, [P_K; K], [P_V; V]) in every layer",
        source="Li and Liang 2021, arXiv 2101.00190",
        sites=("prefix_kv",),
        text=(
            "As prompt tuning, but what every layer's attention keeps of the k tokens is learned, not only their "
            "embeddings: far more to steer with at the same cost in context. It starts as the keys and values of real "
            "words, which the paper found to help most where rows are few. In layers with a sliding window it is out "
            "of sight once a row has grown past the window."
        ),
        folklore=(
            (
                "a longer prefix is a better one",
                "on GPT-3 it collapsed past 32 tokens (Hu et al. 2021)",
            ),
            (
                "prefix tuning is prompt tuning",
                "prompt tuning learns the input's embeddings, prefix tuning what each layer attends to",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh prefix on every layer; SpecError for a base whose attention cannot be exchanged."""
        from luthier.adapt import prompts

        options = self.options
        network = {"prefix_projection": True, "encoder_hidden_size": options.projection, "init_weights": "zero"}

        def make(config: Any, shape: prompts.Shape) -> prompts.Table | prompts.Encoded:
            if options.init == "random":
                start = prompts.random_key_values(model, shape)
            else:
                start = prompts.key_values_of(model, options.ids(model, shape.tokens), shape)
            if options.projection is None:
                return prompts.Table(start)
            from peft import PrefixEncoder

            return prompts.Encoded(PrefixEncoder(config), shape.tokens, start)

        return prompts.attach(
            model, KIND, options.tokens, make, seed=seed, **(network if options.projection is not None else {})
        )

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put a saved prefix on the model."""
        from luthier.adapt import prompts

        return prompts.load(model, folder, KIND)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay would pull keys and values to zero, which is a token like any other: none."""
        return {name: {"weight_decay": 0.0} for name in names}
