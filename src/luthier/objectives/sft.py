"""Supervised fine-tuning: -sum w_t log p(y_t), divided by sum w_t over the whole optimiser step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier import contracts
from luthier.records import Loss

if TYPE_CHECKING:
    import torch


class SFT(contracts.Objective):
    def loss(self, logprobs: torch.Tensor, batch: Any) -> Loss:
        """Weighted negative log-likelihood of the answers; `logprobs` (targets,)."""
        weights = batch.target_weights
        return Loss(-(logprobs * weights).sum(), float(weights.abs().sum()))
