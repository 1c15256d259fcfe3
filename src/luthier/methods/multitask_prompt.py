"""Multitask prompt tuning, its second stage: a shared prompt times a low-rank matrix of the task (2303.02861)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.methods._start import StartOptions

KIND = "PROMPT_TUNING"  # what is kept: for one task the product is a plain prompt


class Options(StartOptions):
    """Settings of multitask prompt tuning's second stage."""

    tokens: int = Field(20, ge=1, le=1024, description="length of the prompt; with `source` that prompt's own")
    rank: int = Field(1, ge=1, le=64, description="of the task's matrix; 1 in the paper")
    source: str | None = Field(
        None, description="adapter folder of a prompt that was learned on other tasks, to start from instead of `init`"
    )


class MultitaskPrompt(contracts.Method):
    Options = Options
    fresh = "changes: tokens that were not there stand before every row; the base answers as if it had read them"
    not_merged = "a prompt is input, not weights"
    learning_rate = 3e-2
    bracket = (1e-3, 3e-1)
    about = contracts.About(
        family="additive",
        title="Multitask prompt tuning, second stage: a shared prompt times the task's matrix",
        trains="a prompt, and two thin matrices whose product scales each of its numbers",
        formula="h_0 = [P * (U V); E(x)], U V = 1 at the start",
        source="Wang et al. 2023, arXiv 2303.02861",
        sites=("soft_tokens",),
        text=(
            "The paper learns one prompt on many tasks and then gives each new task a thin matrix that it is "
            "multiplied by. Here is that second stage, for your one task: with `source`, the folder of a prompt that "
            "was learned on other rows, it starts as exactly that prompt; without, it is prompt tuning in other "
            "coordinates and nothing is gained by its name. The distillation of many teachers into the shared prompt, "
            "the paper's first stage, is not here. What is kept is the product, a plain prompt."
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Put a fresh product before the input; SpecError for a base or a source that does not fit."""
        from luthier.adapt import prompts

        options = self.options
        source = prompts.source(model, Path(options.source)) if options.source is not None else None
        tokens = options.tokens if source is None else len(source)

        def make(config: Any, shape: prompts.Shape) -> prompts.Encoded:
            if source is not None:
                start = source
            elif options.init == "random":
                start = prompts.random_embeddings(model, shape)
            else:
                start = prompts.embeddings_of(model, options.ids(model, tokens))
            return prompts.factored(model, start, options.rank)

        return prompts.attach(model, KIND, tokens, make, seed=seed)

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put a saved prompt on the model; its factors are one by now, its rows can be learned on."""
        from luthier.adapt import prompts

        return prompts.load(model, folder, KIND)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay would pull the task's matrix to zero, not to one: none."""
        return {name: {"weight_decay": 0.0} for name in names}
