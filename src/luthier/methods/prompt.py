"""Prompt tuning: learned embeddings before the input (Lester et al. 2104.08691)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._start import StartOptions

KIND = "PROMPT_TUNING"


class Options(StartOptions):
    """Prompt tuning's settings."""

    tokens: int = Field(20, ge=1, le=1024, description="length of the prompt; each one costs as much as a token")


class Prompt(contracts.Method):
    Options = Options
    fresh = "changes: tokens that were not there stand before every row; the base answers as if it had read them"
    not_merged = "a prompt is input, not weights"
    learning_rate = 3e-2
    bracket = (1e-3, 3e-1)
    about = contracts.About(
        family="additive",
        title="Prompt tuning: learned embeddings before the input",
        trains="the embeddings of a few tokens that no word has",
        formula="h_0 = [P; E(x)], P of k rows",
        source="Lester et al. 2021, arXiv 2104.08691",
        sites=("soft_tokens",),
        text=(
            "A few rows of numbers stand before every input where the embeddings of an instruction would stand, and "
            "are learned. Some ten thousand numbers in all: the smallest adapter that can be swapped per request. It "
            "starts as random words of the vocabulary, or as a text of yours, and so changes the base's answers from "
            "the first step on. It needs a learning rate some thirty times LoRA's and more steps, it is weak on small "
            "models, and it takes k tokens of the context for good."
        ),
        folklore=(
            (
                "prompt tuning does not work",
                "the learning rate decides, then the first values: 5.7, 23.4 and 34.3 % in PEFT's own comparison",
            ),
            ("a soft prompt is a text", "its rows lie beside the vocabulary's; the nearest words seldom mean anything"),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh prompt before the input; SpecError for a base that does not take embeddings."""
        from luthier.adapt import prompts

        options = self.options

        def make(config: Any, shape: prompts.Shape) -> prompts.Table:
            if options.init == "random":
                return prompts.Table(prompts.random_embeddings(model, shape))
            return prompts.Table(prompts.embeddings_of(model, options.ids(model, shape.tokens)))

        return prompts.attach(model, KIND, options.tokens, make, seed=seed)

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put a saved prompt on the model."""
        from luthier.adapt import prompts

        return prompts.load(model, folder, KIND)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay would pull the prompt to no token at all: none."""
        return {name: {"weight_decay": 0.0} for name in names}
