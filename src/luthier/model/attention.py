"""Attention over a prefix tree: every token sees its ancestors' segments and its own past, nothing else.

Three interchangeable forms, checked against each other and against separate rows by tests:

- `cascade` (CPU): the depth-first layout makes the descendants of a segment one slice, so one unmasked flash call
  attends all of them to it, and segments of like length attend to themselves in one batched causal call. The parts
  are joined by their log-sum-exps; the backward pass hands the *joined* output and log-sum-exp to the flash backward
  of each part, which makes each part's gradient exact (as in ring attention, Liu et al. 2310.01889).
- `flex` (CUDA): FlexAttention skips every block of 128 x 128 tokens of which none sees the other (`model.flex`).
- `dense` (any device): one boolean (tokens, tokens) mask through scaled_dot_product_attention; also what dropout and,
  on a CPU, sliding windows shorter than the pack use.

In the depth-first layout one number tells all: token j is seen by the tokens from j to its segment's subtree's end.

The tree travels as an argument of the model's forward (`tree=`); without it this attention raises, since stock masks
would cut packed rows from their prefix without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from luthier.errors import ModelError
from luthier.model import flex
from luthier.records import Pack

NAME = "luthier_tree"
REFUSED = "luthier_shares_not"  # attribute of a model that was found to differ
KNOWN_LAYERS = {"full_attention", "sliding_attention"}

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Own:
    """Segments of like length that attend to themselves: `index` (segments, longest), `valid` None when unpadded."""

    index: torch.Tensor
    valid: torch.Tensor | None


@dataclass(frozen=True)
class Cross:
    """Tokens [first, last) attend to all of an ancestor's tokens [begin, end)."""

    first: int
    last: int
    begin: int
    end: int


@dataclass
class Tree:
    """The shape of one pack, as attention needs it."""

    size: int
    deepest: int  # largest position
    owns: list[Own]
    crosses: list[Cross]
    positions: torch.Tensor  # (tokens,)
    seen_until: torch.Tensor  # (tokens,) one past the last token that sees this one
    form: str
    root: torch.Tensor | None = None  # (layers, 2, kv heads, k, head size): stands for the first k keys and values
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _blocks: dict[int | None, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pack: Pack, device: torch.device | str = "cpu", form: str = "auto") -> Tree:
        """Prepare a pack's shape; `form` is cascade, flex, dense or auto (what is fastest on the device)."""
        device = torch.device(device)
        lengths = (pack.starts[1:] - pack.starts[:-1]).tolist()
        starts, ends = pack.starts.tolist(), pack.ends.tolist()
        crosses = [
            Cross(starts[s + 1], ends[s], starts[s], starts[s + 1])
            for s in range(len(lengths))
            if ends[s] > starts[s + 1]
        ]
        return cls(
            size=len(pack),
            deepest=int(pack.positions.max()),
            owns=[_own(bucket, starts, lengths, device) for bucket in _buckets(lengths)],
            crosses=crosses,
            positions=torch.from_numpy(pack.positions).to(device),
            seen_until=torch.from_numpy(pack.ends.repeat(lengths)).to(device),
            form=_best_form(device) if form == "auto" else form,
        )

    def rooted(self, tokens: int, key_values: torch.Tensor | None = None) -> Tree:
        """The same tree below one more segment of `tokens` tokens that everyone sees, for a soft prompt (`model.soft`).

        With `key_values` (layers, 2, kv heads, tokens, head size) that segment's keys and values are replaced by these.
        """
        first = torch.arange(tokens, device=self.positions.device)
        moved = (Cross(c.first + tokens, c.last + tokens, c.begin + tokens, c.end + tokens) for c in self.crosses)
        return Tree(
            size=self.size + tokens,
            deepest=self.deepest + tokens,
            owns=[Own(first[None], None), *(Own(own.index + tokens, own.valid) for own in self.owns)],
            crosses=[Cross(tokens, self.size + tokens, 0, tokens), *moved],
            positions=torch.cat([first, self.positions + tokens]),
            seen_until=torch.cat([torch.full_like(first, self.size + tokens), self.seen_until + tokens]),
            form=self.form,
            root=key_values,
        )

    def mask(self, window: int | None) -> torch.Tensor:
        """Boolean (tokens, tokens): may the row's token see the column's? Kept for the other layers."""
        if window not in self._masks:
            order = torch.arange(self.size, device=self.positions.device)
            sees = (order[:, None] >= order[None, :]) & (order[:, None] < self.seen_until[None, :])
            if window is not None:
                sees &= self.positions[:, None] - self.positions[None, :] < window
            self._masks[window] = sees
        return self._masks[window]

    def blocks(self, window: int | None) -> Any:
        """The mask as FlexAttention's blocks. Kept for the other layers."""
        if window not in self._blocks:
            self._blocks[window] = flex.block_mask(self.seen_until, self.positions, window)
        return self._blocks[window]


def _buckets(lengths: list[int]) -> list[list[int]]:
    """Group segments so that padding to a group's longest wastes little (none shorter than 0.6 of it)."""
    groups: list[list[int]] = []
    for segment in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        if groups and lengths[segment] >= 0.6 * lengths[groups[-1][0]]:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _own(bucket: list[int], starts: list[int], lengths: list[int], device: torch.device) -> Own:
    longest = lengths[bucket[0]]
    own = torch.tensor([lengths[s] for s in bucket])
    index = torch.tensor([starts[s] for s in bucket])[:, None] + torch.arange(longest)
    valid = torch.arange(longest) < own[:, None]
    index = torch.where(valid, index, index[:, :1])  # padding repeats the first token; it is masked or thrown away
    return Own(index.to(device), None if bool(valid.all()) else valid.to(device))


def _best_form(device: torch.device) -> str:
    if device.type == "cpu":
        return "cascade"
    return "flex" if flex.usable(device) else "dense"


class _Cascade(torch.autograd.Function):
    """q (1, heads, tokens, size), k and v (1, key-value heads, tokens, size) -> (1, heads, tokens, size)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=torch.float32)
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        for own in tree.owns:
            part, part_lse = _flash(_pick(q, own), _pick(k, own), _pick(v, own), 0.0, True, scale=scale)
            _put(out[0], own, part)
            _put(lse[0], own, part_lse)
        for cross in tree.crosses:
            part, part_lse = _flash(*_slices(cross, q, k, v), 0.0, False, scale=scale)
            here, here_lse = out[:, :, cross.first : cross.last], lse[:, :, cross.first : cross.last]
            # joined = sigma(a - b) a-part + sigma(b - a) b-part, in place
            share = torch.sigmoid(part_lse - here_lse)
            torch.logaddexp(here_lse, part_lse, out=here_lse)
            torch.lerp(here, part.float(), share.unsqueeze(-1), out=here)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad, scale = grads[0].contiguous(), ctx.scale
        grad_q, grad_k, grad_v = (torch.zeros(t.shape, dtype=torch.float32) for t in (q, k, v))
        for own in ctx.tree.owns:
            upstream = _pick(grad, own)
            if own.valid is not None:
                upstream = upstream * own.valid[:, None, :, None]
            saved = (_pick(t, own) for t in (q, k, v, out, lse))
            parts = _flash_backward(upstream, *saved, 0.0, True, scale=scale)
            for total, part in zip((grad_q, grad_k, grad_v), parts, strict=True):
                _put(total[0], own, part)
        for cross in ctx.tree.crosses:
            rows = slice(cross.first, cross.last)
            query, key, value = _slices(cross, q, k, v)
            part_q, part_k, part_v = _flash_backward(
                grad[:, :, rows], query, key, value, out[:, :, rows], lse[:, :, rows], 0.0, False, scale=scale
            )
            grad_q[:, :, rows] += part_q
            grad_k[:, :, cross.begin : cross.end] += part_k
            grad_v[:, :, cross.begin : cross.end] += part_v
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _pick(x: torch.Tensor, own: Own) -> torch.Tensor:
    """(1, heads, tokens, ...) -> (segments, heads, longest, ...)."""
    segments, longest = own.index.shape
    if segments == 1:
        first = int(own.index[0, 0])
        return x[:, :, first : first + longest]
    picked: torch.Tensor = x[0].index_select(1, own.index.flatten())
    return picked.view(picked.shape[0], segments, longest, *picked.shape[2:]).transpose(0, 1)


def _put(total: torch.Tensor, own: Own, part: torch.Tensor) -> None:
    """Write (segments, heads, longest, ...) to (heads, tokens, ...). Each token has one own segment: no adding up."""
    segments, longest = own.index.shape
    if segments == 1:
        first = int(own.index[0, 0])
        total[:, first : first + longest] = part[0]
        return
    flat = part.transpose(0, 1).flatten(1, 2)
    if own.valid is None:
        total[:, own.index.flatten()] = flat.to(total.dtype)
    else:
        keep = own.valid.flatten()
        total[:, own.index.flatten()[keep]] = flat[:, keep].to(total.dtype)


def _slices(cross: Cross, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    keys = slice(cross.begin, cross.end)
    return q[:, :, cross.first : cross.last], k[:, :, keys], v[:, :, keys]


def tree_attention(
    module: Any,
    query: torch.Tensor,  # (1, heads, tokens, head size)
    key: torch.Tensor,  # (1, key-value heads, tokens, head size)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; returns (1, tokens, heads, head size)."""
    if tree is None or attention_mask is not None:
        raise ModelError("tree attention was called without its tree: pass `tree=` to the model's forward")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} uses soft-capped or sink attention, which prefix trees do not share")
    if tree.root is not None:
        key, value = put_in_front(tree.root[module.layer_idx], key, value)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None and tree.deepest >= sliding_window else None
    if tree.form == "cascade" and window is None and not dropout:
        mixed = _Cascade.apply(query, key, value, tree, scale)
    elif tree.form == "flex" and not dropout:
        mixed = flex.attend(query, key, value, tree.blocks(window), scale)
    else:
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=tree.mask(window),
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return mixed.transpose(1, 2).contiguous(), None


def put_in_front(root: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Replace the first k of one row's keys and values (1, kv heads, tokens, size) by `root` (2, kv heads, k, size)."""
    tokens = root.shape[2]
    pairs = zip(root.unsqueeze(1), (key, value), strict=True)
    return tuple(torch.cat([learned, states[:, :, tokens:]], 2) for learned, states in pairs)


AttentionInterface.register(NAME, tree_attention)


def shares_prefixes(model: Any) -> str:
    """Empty if prefix trees are exact for this architecture, else the reason why they are not."""
    if refused := getattr(model, REFUSED, ""):
        return str(refused)
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not getattr(model, "_supports_attention_backend", False):
        return f"{config.model_type} does not let its attention be exchanged"
    if layers - KNOWN_LAYERS:
        return f"{config.model_type} has layers other than attention ({', '.join(sorted(layers - KNOWN_LAYERS))})"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{config.model_type} caps its attention logits"
    return ""


def refuse_sharing(model: Any, reason: str) -> None:
    """Mark a model as one whose rows must run apart."""
    setattr(model, REFUSED, reason)


@contextmanager
def attending(model: Any, name: str = NAME) -> Iterator[None]:
    """Let the model use an attention of this name inside the block."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def recompute_activations(model: Any) -> None:
    """Turn gradient checkpointing on. Layers are run again during backward, and then need the tree's attention too."""
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), attending(model))}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
