"""A guard before the first step: does the prefix tree give this model's own answer on this task's own rows?

The laws are tested for known families. A model that nobody has tried may scale, cap or mask in a way of its own, so a
few rows are run both ways; where they differ the model runs without sharing, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from luthier.model.attention import refuse_sharing, shares_prefixes
from luthier.model.batch import Batch
from luthier.model.logprob import logprobs
from luthier.records import Pack, Rendered
from luthier.text import pack

ROWS = 3  # shortest rows, run both ways
# Largest mean absolute difference of log-probabilities, in nats, that rounding explains.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@torch.no_grad()
def prove_sharing(model: Any, rendered: Sequence[Rendered]) -> str:
    """Compare shared with separate rows; return why this model must not share, or an empty string.

    A model that fails is marked, so that training and generation take the separate path.
    """
    if reason := shares_prefixes(model):
        return reason
    rows = sorted((row for row in rendered if row.supervised), key=lambda row: len(row.ids))[:ROWS]
    if not rows:
        return ""
    (tree,) = pack.plan(rows, budget=sum(len(row.ids) for row in rows))
    together = logprobs(model, Batch.of(tree, model.device))
    apart = torch.cat([_own_logprobs(model, rows, tree, index) for index in range(len(tree.rows))])
    difference = float((together - apart).abs().mean())
    if difference <= TOLERANCE.get(model.dtype, 0.1):
        return ""
    reason = f"shared and separate rows differ by {difference:.2g} nats on this model"
    refuse_sharing(model, reason)
    return reason


def _own_logprobs(model: Any, rows: Sequence[Rendered], tree: Pack, index: int) -> torch.Tensor:
    """Log-probabilities of one row's targets through the model's whole forward, in the order of the tree's targets."""
    row = next(row for row in rows if row.example_id == tree.rows[index])
    ids = torch.tensor([row.ids], device=model.device)
    table = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
    picked = table.gather(1, ids[0, 1:, None])[:, 0]
    wanted = [position - 1 for position, weight in enumerate(row.weights) if position and weight]
    return picked[wanted]
