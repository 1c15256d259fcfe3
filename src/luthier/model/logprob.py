"""Log-probabilities of a pack's targets: one body pass over the tree, the head only where something is predicted.

Gains measured in docs/benchmarks.md. The head's work is chunked, and for a frozen head its input gradient is taken
during the forward pass (log p is linear in its upstream gradient), so that no (targets, vocabulary) array outlives a
chunk and the head is never run twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from luthier.errors import ModelError
from luthier.model.attention import attending, shares_prefixes
from luthier.model.batch import Batch, Entry
from luthier.model.passing import layers_of, passing
from luthier.model.soft import Soft, soft_of

CHUNK = 512  # targets per head product: 100 MB of float32 logits at a vocabulary of 49,152


def logprobs(model: Any, batch: Batch, *, chunk: int = CHUNK) -> torch.Tensor:
    """Return log p(target) as float32 (targets,), with autograd to whatever is trainable."""
    states = hidden_states(model, batch)  # (tokens, hidden_size)
    picked = states.index_select(0, batch.target_source)  # (targets, hidden_size)
    return head_logprobs(model, picked, batch.target_ids, chunk=chunk)


def hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """Run the body (no head) and return the last hidden states (tokens, hidden_size); a soft prompt's are cut off."""
    body, soft = model.get_decoder(), soft_of(model)
    if shares_prefixes(model):
        return _separate(model, body, batch, soft)
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions, "tree": batch.tree}
    if batch.entry is not None and soft is None:
        return _from_layer(model, body, batch, batch.entry)
    if soft is not None:
        tree = batch.tree.rooted(soft.tokens, soft.key_values(model))
        inputs = {**soft.before(model, batch.ids), "position_ids": tree.positions[None], "tree": tree}
    with attending(model):
        out = body(**inputs, use_cache=False)
    states: torch.Tensor = out.last_hidden_state[0]
    return states if soft is None else states[soft.tokens :]


def _from_layer(model: Any, body: Any, batch: Batch, entry: Entry) -> torch.Tensor:
    """Run only the layers that kept states enter, and the last norm."""
    states = entry.states[None]
    with attending(model), passing(layers_of(model)[: entry.depth]):
        out = body(inputs_embeds=states, position_ids=batch.positions, tree=batch.tree, use_cache=False)
    last: torch.Tensor = out.last_hidden_state[0]
    return last


def _separate(model: Any, body: Any, batch: Batch, soft: Soft | None) -> torch.Tensor:
    """Architectures that cannot share: every segment must be a whole row; rows run padded, in the model's own way."""
    tree = batch.tree
    if tree.crosses:
        raise ModelError(f"{shares_prefixes(model)}: pack its rows with share=False")
    if soft is not None and soft.kind != "embeddings":
        raise ModelError(f"{shares_prefixes(model)}: it cannot take a prefix of keys and values")
    states: torch.Tensor | None = None
    for own in tree.owns:
        mask = own.valid if own.valid is not None else torch.ones_like(own.index, dtype=torch.bool)
        inputs, seen = {"input_ids": batch.ids[0][own.index]}, mask.long()
        if soft is not None:
            inputs, seen = soft.before(model, inputs["input_ids"]), F.pad(seen, (soft.tokens, 0), value=1)
        out = body(**inputs, attention_mask=seen, use_cache=False).last_hidden_state[:, -mask.shape[1] :]
        if states is None:
            states = out.new_zeros(tree.size, out.shape[-1])
        states = states.index_put((own.index[mask],), out[mask])
    assert states is not None, "a pack has tokens"
    return states


def head_logprobs(model: Any, states: torch.Tensor, targets: torch.Tensor, *, chunk: int = CHUNK) -> torch.Tensor:
    """Log p(targets) (n,) float32 from states (n, hidden_size) through the output head."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    factor = _logit_factor(config)
    if type(head) is torch.nn.Linear and not head.weight.requires_grad and cap is None:
        return _FrozenHead.apply(states, head.weight, head.bias, targets, factor, chunk)  # type: ignore[no-any-return]
    parts = []
    for piece, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        parts.append(-F.cross_entropy(head_logits(model, piece), wanted, reduction="none"))
    return torch.cat(parts)


def head_logits(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Float32 logits (..., vocabulary) from states, scaled and capped as the model's own forward does."""
    config = model.config.get_text_config()
    logits: torch.Tensor = model.get_output_embeddings()(states).float() * _logit_factor(config)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _logit_factor(config: Any) -> float:
    """Granite divides its logits, Cohere multiplies them; everyone else leaves them alone."""
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


class _FrozenHead(torch.autograd.Function):
    """d log p(y) / d state = factor (W[y] - softmax @ W), computed with the logits at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        factor: float,
        chunk: int,
    ) -> torch.Tensor:
        needs = ctx.needs_input_grad[0]
        slope = torch.empty_like(states) if needs else None
        result = torch.empty(len(states), dtype=torch.float32, device=states.device)
        for first in range(0, len(states), chunk):
            rows = slice(first, first + chunk)
            logits = F.linear(states[rows], weight, bias).float()
            if factor != 1.0:
                logits *= factor
            total = torch.logsumexp(logits, -1)
            result[rows] = logits.gather(1, targets[rows, None])[:, 0] - total
            if slope is not None:
                shares = logits.sub_(total[:, None]).exp_().to(weight.dtype)
                slope[rows] = weight[targets[rows]] - shares @ weight
        ctx.factor = factor
        if slope is not None:
            ctx.save_for_backward(slope)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * (grads[0][:, None] * ctx.factor).to(slope.dtype)), None, None, None, None, None
