"""Generation over a shared prompt: the common prefix's keys and values are computed and kept once for all rows.

Every row keeps only its own keys; attention to the prefix is one call for the whole batch, joined with the row's own
part by log-sum-exps. Rows are right-padded, so positions and sliding windows are exact. Finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from luthier.errors import ModelError
from luthier.model.attention import attending, put_in_front, shares_prefixes
from luthier.model.logprob import head_logits
from luthier.model.soft import soft_of
from luthier.records import Completion

NAME = "luthier_decode"
WORTH_SHARING = 8  # tokens of common prefix from which keeping them apart pays

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Memory:
    """Keys and values by layer: `prefix` (1, kv heads, P, size) of all rows, `own` (rows, kv heads, room, size)."""

    room: int
    lengths: torch.Tensor  # (rows,) own tokens kept, before this call's
    phase: str = "prefix"  # prefix | fill | step
    prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    longest: int = 0  # own tokens of the longest row, this call's included
    root: torch.Tensor | None = None  # (layers, 2, kv heads, k, size): stands for the prefix's first k keys and values

    def keep(self, rows: torch.Tensor) -> None:
        """Drop every row but these."""
        self.lengths = self.lengths[rows]
        self.own = {layer: (k[rows], v[rows]) for layer, (k, v) in self.own.items()}

    def remember(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store this call's keys and values (rows, kv heads, new, size)."""
        if self.phase == "prefix":
            self.prefix[layer] = (key, value)
            return
        rows, heads, new, size = key.shape
        if layer not in self.own:
            self.own[layer] = (
                key.new_zeros(rows, heads, self.room, size),
                value.new_zeros(rows, heads, self.room, size),
            )
        for kept, fresh in zip(self.own[layer], (key, value), strict=True):
            if self.phase == "fill":
                kept[:, :, :new] = fresh
            else:
                kept[torch.arange(rows, device=kept.device), :, self.lengths] = fresh[:, :, 0]


def decode_attention(
    module: Any,
    query: torch.Tensor,  # (rows, heads, new, size)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    memory: Memory | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls while generating; returns (rows, new, heads, size)."""
    if memory is None:
        raise ModelError("decoding attention was called without its memory")
    if memory.phase == "prefix" and memory.root is not None:
        key, value = put_in_front(memory.root[module.layer_idx], key, value)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    memory.remember(module.layer_idx, key, value)
    own = (
        (key, value)
        if memory.phase != "step"
        else tuple(t[:, :, : memory.longest] for t in memory.own[module.layer_idx])
    )
    mixed = _attend(query, own, memory, module.layer_idx, scale, sliding_window)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, decode_attention)


def _attend(
    query: torch.Tensor, own: tuple[torch.Tensor, ...], memory: Memory, layer: int, scale: float, window: int | None
) -> torch.Tensor:
    """Attend to the row's own keys and to the shared prefix; (rows, heads, new, size)."""
    rows, heads, new, size = query.shape
    own_key, own_value = own
    slots = torch.arange(own_key.shape[2], device=query.device)
    at = (
        slots[None, :new].expand(rows, -1) if memory.phase != "step" else memory.lengths[:, None]
    )  # own slot of each query
    sees = slots[None, None, :] <= at[:, :, None]  # (rows, new, slots)
    if window is not None:
        sees &= at[:, :, None] - slots[None, None, :] < window
    if layer not in memory.prefix or memory.phase == "prefix":
        return _sdpa(query, own_key, own_value, sees[:, None], scale)
    prefix_key, prefix_value = memory.prefix[layer]
    length = prefix_key.shape[2]
    past = at[:, :, None] + length - torch.arange(length, device=query.device)  # (rows, new, P) distance
    reach = past < window if window is not None else None
    if reach is not None and bool(reach.all()):
        reach = None
    if query.device.type != "cpu" or reach is not None:
        everything = torch.cat([reach if reach is not None else torch.ones_like(past, dtype=torch.bool), sees], -1)
        keys = torch.cat([prefix_key.expand(rows, -1, -1, -1), own_key], 2)
        values = torch.cat([prefix_value.expand(rows, -1, -1, -1), own_value], 2)
        return _sdpa(query, keys, values, everything[:, None], scale)
    bias = torch.zeros(sees.shape, dtype=query.dtype).masked_fill_(~sees, float("-inf"))[:, None]
    part, part_lse = _flash(query, own_key, own_value, 0.0, False, attn_mask=bias, scale=scale)
    folded = query.transpose(0, 1).reshape(1, heads, rows * new, size)
    far, far_lse = _flash(folded, prefix_key, prefix_value, 0.0, False, scale=scale)
    far = far.view(heads, rows, new, size).transpose(0, 1)
    far_lse = far_lse.view(heads, rows, new).transpose(0, 1)
    share = torch.sigmoid(far_lse - part_lse).unsqueeze(-1)
    return torch.lerp(part.float(), far.float(), share).to(query.dtype)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


@torch.inference_mode()
def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: frozenset[int] | set[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[int, int, float]]:
    """Yield (row, token, log-probability) as tokens are chosen, for all rows at once; a stop token is yielded too.

    Greedy at temperature 0. Raises ModelError for architectures whose attention cannot be exchanged.
    """
    if reason := shares_prefixes(model):
        raise ModelError(f"cannot generate with a shared prompt: {reason}", remedy="use generate(), which falls back")
    device = model.device
    generator = torch.Generator(device=device).manual_seed(seed)
    shared = _shared_length(prompts)
    lengths = torch.tensor([len(prompt) - shared for prompt in prompts], device=device)
    memory = Memory(room=int(lengths.max()) + max_new_tokens, lengths=torch.zeros_like(lengths))
    with attending(model, NAME):
        begin = begin_with(model, prompts[0][:shared], memory)
        memory.phase, longest = "fill", int(lengths.max())
        memory.longest = longest
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - shared] = torch.tensor(list(prompt[shared:]), device=device)
        states = forward(model, ids, memory, begin)
        last = states[torch.arange(len(prompts), device=device), lengths - 1]
        memory.phase, memory.lengths = "step", lengths
        active = torch.arange(len(prompts), device=device)
        for count in range(max_new_tokens):
            tokens, logprobs = _choose(head_logits(model, last), temperature, generator)
            chosen = tokens.tolist()
            yield from zip(active.tolist(), chosen, logprobs.tolist(), strict=True)
            going = torch.tensor([token not in stop_ids for token in chosen], device=device)
            if count == max_new_tokens - 1 or not bool(going.any()):
                return
            if not bool(going.all()):
                rows = going.nonzero()[:, 0]
                active, tokens = active[rows], tokens[rows]
                memory.keep(rows)
            memory.longest = int(memory.lengths.max()) + 1
            last = forward(model, tokens[:, None], memory, begin)[:, 0]
            memory.lengths = memory.lengths + 1


def begin_with(model: Any, shared: Sequence[int], memory: Memory) -> int:
    """Run what all rows begin with, a soft prompt before their own tokens, and return its length."""
    soft, ids = soft_of(model), torch.tensor([list(shared)], dtype=torch.long, device=model.device)
    if soft is None:
        if shared:
            forward(model, ids, memory, 0)
        return len(shared)
    memory.root, length = soft.key_values(model), soft.tokens + len(shared)
    if memory.root is not None and not shared:
        memory.prefix = {layer: (pair[:1], pair[1:]) for layer, pair in enumerate(memory.root)}
        return length
    positions = torch.arange(length, device=ids.device)[None]
    model.get_decoder()(**soft.before(model, ids), position_ids=positions, use_cache=False, memory=memory)
    return length


def forward(model: Any, ids: torch.Tensor, memory: Memory, begin: int) -> torch.Tensor:
    """Run the body on (rows, new) ids behind a prefix of `begin` tokens; states (rows, new, hidden_size)."""
    first = memory.lengths[: len(ids), None] if memory.phase == "step" else torch.zeros_like(ids[:, :1])
    positions = begin + first + torch.arange(ids.shape[1], device=ids.device)[None]
    out = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, memory=memory)
    states: torch.Tensor = out.last_hidden_state
    return states


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(logits, -1)
    if temperature > 0:
        tokens = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
    else:
        tokens = logits.argmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving at least one own token to each; 0 when keeping them does not pay."""
    if len(prompts) < 2:
        return 0
    least, most = min(map(tuple, prompts)), max(map(tuple, prompts))
    length = 0
    for a, b in zip(least, most, strict=False):
        if a != b:
            break
        length += 1
    length = min(length, min(len(prompt) for prompt in prompts) - 1)
    return length if length >= WORTH_SHARING else 0


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    decode: Callable[[Sequence[int]], str],
    stop_ids: frozenset[int] | set[int],
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answer all prompts (token ids) in order; rows of like length run together. `on_done(n)` after each batch."""
    results: dict[int, Completion] = {}
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        events = _events(model, [prompts[row] for row in rows], stop_ids, max_new_tokens, temperature, seed + first)
        for index, token, logprob in events:
            tokens[index].append(token)
            logprobs[index].append(logprob)
        for index, row in enumerate(rows):
            ended = bool(tokens[index]) and tokens[index][-1] in stop_ids
            ids = tokens[index][:-1] if ended else tokens[index]
            results[row] = Completion(decode(ids), tuple(ids), "end" if ended else "length", tuple(logprobs[index]))
        if on_done:
            on_done(len(results))
    return [results[row] for row in range(len(prompts))]


def _events(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int] | set[int],
    limit: int,
    temperature: float,
    seed: int,
) -> Iterator[tuple[int, int, float]]:
    """Stream over a shared prompt, or row by row with the model's own cache where its attention cannot be exchanged."""
    if not shares_prefixes(model):
        yield from stream(model, prompts, stop_ids=stop_ids, max_new_tokens=limit, temperature=temperature, seed=seed)
        return
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for row, prompt in enumerate(prompts):
        ids, cache = torch.tensor([list(prompt)], device=model.device), None
        for _ in range(limit):
            with torch.inference_mode():
                out = model(input_ids=ids, use_cache=True, **({"cache": cache} if cache is not None else {}))
                cache = out.get("cache", out.get("past_key_values"))
                token, logprob = _choose(out.logits[:, -1].float(), temperature, generator)
            yield row, int(token), float(logprob)
            if int(token) in stop_ids:
                break
            ids = token[:, None]
