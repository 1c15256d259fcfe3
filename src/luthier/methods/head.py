"""Output head: only the last matrix learns, on a frozen body."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier import contracts


class Options(contracts.Options):
    """The head's settings."""

    final_norm: bool = Field(False, description="let the norm before the head learn too")


class Head(contracts.Method):
    Options = Options
    fresh = "exact"  # the new head is a copy of the old one
    learning_rate = 5e-4
    bracket = (5e-5, 1e-2)
    about = contracts.About(
        family="selective",
        title="output head: the last matrix learns on a frozen model",
        trains="the output head, untied from the embedding",
        formula="logits = H' h, only H' learns; h is the frozen body's",
        source="linear probing as in Alain and Bengio 2016, arXiv 1610.01644, kept in a language model",
        sites=("head",),
        text=(
            "The body is frozen and computes what it always did; only the matrix that turns its last states into "
            "scores for tokens learns, starting from a copy of the base's. Nothing is computed backwards through the "
            "body, so a step costs little more than reading. Where the head is tied to the embedding (SmolLM2, Gemma) "
            "it is untied first, or inputs would change with it: 28.3 million numbers for SmolLM2-135M, and a merged "
            "model says that it is untied. It can re-weigh what the frozen states already tell (style, label words, "
            "format), not compute anything new: a lower bound that says how much a task needs more."
        ),
        folklore=(
            (
                "an adapter is an output layer on top",
                "this is the output layer on top; adapters sit inside every block",
            ),
            ("a head is a small adapter", "in a small model with a large vocabulary it is one of the largest"),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Free the head, untied where it was tied."""
        from luthier.adapt import blocks
        from luthier.adapt.freed import FreedAdapted

        name, module = blocks.head(model)
        names = [f"{name}.{own}" for own, _ in module.named_parameters()]
        if self.options.final_norm:
            norms = blocks.outer_norms(model)
            names += [f"{norm}.{own}" for norm, part in norms.items() for own, _ in part.named_parameters()]
        return FreedAdapted(model, names, untied=blocks.tied(model))

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put a saved head on the model."""
        from luthier.adapt import freed

        return freed.load(model, folder)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay would pull gains and biases to zero: none on them."""
        return {name: {"weight_decay": 0.0} for name in names if name.endswith("bias") or "norm" in name}
