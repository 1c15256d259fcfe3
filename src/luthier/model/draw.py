"""The choice of a token. What a row draws depends on the seed and the row's number only, not on its company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


class Draws:
    """A row's uniform numbers, one for each of its tokens."""

    def __init__(self, seed: int, row: int) -> None:
        self._random = np.random.default_rng([seed % 2**64, row])

    def next(self) -> float:
        """The next number in [0, 1)."""
        return float(self._random.random())


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0."""

    temperature: float = 0.0
    seed: int = 0

    def draws(self, row: int) -> Draws | None:
        """The numbers that a row will need; None where nothing is drawn."""
        return Draws(self.seed, row) if self.temperature > 0 else None


def choose(logits: torch.Tensor, sampling: Sampling, draws: Sequence[Draws | None]) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities (at temperature 1) from float32 logits (rows, vocabulary)."""
    if sampling.temperature > 0:
        numbers = torch.tensor([each.next() for each in draws if each], dtype=torch.float64)
        # In float64: a sum over a large vocabulary in float32 would lose the rare tokens.
        sums = torch.softmax(logits / sampling.temperature, -1).cpu().double().cumsum(-1)
        tokens = torch.searchsorted(sums, (numbers * sums[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1).to(logits.device)
    else:
        tokens = logits.argmax(-1)
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return tokens.tolist(), logprobs.tolist()
