"""How fast a tuned model answers against its base: rounds in turns, so that a busy machine cancels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

PROMPTS, TOKENS, ROUNDS = 8, 24, 5  # answered together, tokens of each, turns


def seconds(model: Any, prompts: Sequence[Sequence[int]], tokens: int = TOKENS) -> float:
    """Time of answering prompts with exactly `tokens` tokens each, in one batch.

    Nothing is guessed: how well that goes depends on what is said, not on how fast the model is.
    """
    from luthier.model.generate import generate

    began = time.perf_counter()
    generate(
        model, prompts, decode=lambda ids: "", stop_ids=frozenset(), max_new_tokens=tokens, batch_size=len(prompts),
        guess=False,
    )  # fmt: skip
    return time.perf_counter() - began


def against(
    base: Any, other: Any, prompts: Sequence[Sequence[int]], *, rounds: int | None = None, tokens: int = TOKENS
) -> dict[str, float]:
    """Tokens a second of `other` as a share of the base's: the median over rounds that begin with either in turn."""
    seconds(base, prompts, tokens), seconds(other, prompts, tokens)  # the first calls choose kernels
    pairs = []
    for turn in range(rounds or ROUNDS):
        first, second = (base, other) if turn % 2 == 0 else (other, base)
        one, two = seconds(first, prompts, tokens), seconds(second, prompts, tokens)
        pairs.append((one, two) if turn % 2 == 0 else (two, one))
    ratios = [plain / tuned for plain, tuned in pairs]
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "tokens_per_second": len(prompts) * tokens / statistics.median(tuned for _, tuned in pairs),
    }
