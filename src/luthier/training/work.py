"""The work that an optimiser step needs after sharing, in floating point operations, and what it would be without.

Products of the body are as the step was seen to multiply them, scaled by its tokens; attention is counted from the
packs' trees (each token sees its ancestors and itself), the head from the targets. Backward attention is taken as twice
the forward one: a kernel that computes its scores a second time needs more time, not more work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.contracts import Adapted
from luthier.records import IntArray, Pack
from luthier.training.profile import ADAPTER, ATTENTION, BACKWARD, FORWARD, HEAD, Seen

BACK = 2.0  # backward attention over forward attention
BODY = (FORWARD, BACKWARD, ADAPTER)


@dataclass(frozen=True)
class Rates:
    """What one token, one pair of tokens that see each other, and one head position cost; by part."""

    body: dict[str, float]  # operations of a computed token
    layers: tuple[tuple[int | None, float], ...]  # of each layer: its window, operations of a seen pair
    head: float  # of a position that the head runs on

    def of(self, packs: Sequence[Pack]) -> dict[str, float]:
        """Operations of these packs by part."""
        depths = np.concatenate([pack.positions for pack in packs])
        return self._sum(len(depths), depths + 1, sum(len(pack.target_ids) for pack in packs))

    def separate(self, packs: Sequence[Pack], *, everywhere: bool) -> dict[str, float]:
        """Operations of the same rows run apart, the head on every position or only where something is predicted."""
        lengths = np.concatenate([_lengths(pack) for pack in packs])
        tokens, targets = int(lengths.sum()), sum(len(pack.target_ids) for pack in packs)
        seen = np.concatenate([np.arange(1, length + 1) for length in lengths])
        return self._sum(tokens, seen, tokens if everywhere else targets)

    def _sum(self, tokens: int, seen: IntArray, positions: int) -> dict[str, float]:
        pairs = {window: _pairs(seen, window) for window, _ in self.layers}
        return {
            **{part: rate * tokens for part, rate in self.body.items()},
            ATTENTION: sum(cost * pairs[window] for window, cost in self.layers),
            HEAD: self.head * positions,
        }


def rates(seen: Seen, packs: Sequence[Pack], adapted: Adapted) -> Rates:
    """Learn the rates from one watched step and the packs that it ran."""
    config = adapted.model.config.get_text_config()
    tokens = sum(len(pack) for pack in packs)
    head = adapted.model.get_output_embeddings().weight
    learns = list(adapted.trainable().values())
    passes = 1 + any(weight is not head for weight in learns) + any(weight is head for weight in learns)
    return Rates(
        body={part: seen.flops[part] / tokens for part in BODY if seen.flops[part]},
        layers=_layers(config, seen, len(packs)),
        head=2.0 * config.hidden_size * config.vocab_size * passes,
    )


def _layers(config: Any, seen: Seen, packs: int) -> tuple[tuple[int | None, float], ...]:
    """Each layer's window and the operations of one seen pair: scores and their mixture, forward and backward.

    The lowest layers may not run (their states are kept), and the next ones may have no gradient through them.
    """
    heads, count = config.num_attention_heads, config.num_hidden_layers
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    window = getattr(config, "sliding_window", None)
    runs, learns = (seen.attended // packs, seen.learnt // packs) if seen.attended else (count, count)
    return tuple(
        (window if kind == "sliding_attention" else None, 4.0 * width * ((above <= runs) + BACK * (above <= learns)))
        for above, kind in zip(range(count, 0, -1), kinds, strict=True)
    )


def _pairs(seen: IntArray, window: int | None) -> int:
    return int((seen if window is None else np.minimum(seen, window)).sum())


def _lengths(pack: Pack) -> IntArray:
    """Tokens of each row as it is computed: up to the last one that predicts something."""
    last = np.zeros(len(pack.rows), np.int64)
    np.maximum.at(last, pack.target_row, pack.positions[pack.target_source] + 1)
    return last
