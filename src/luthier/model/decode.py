"""The memory of generation and its attention: shared beginnings are kept once, every row keeps only its own tokens.

A row attends to its own keys and to the stems above it; each stem is one call for all rows below it, and the parts are
joined with their log-sum-exps. Rows lie side by side, right-padded, so positions and sliding windows are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from luthier.errors import ModelError
from luthier.model.attention import attending, put_in_front
from luthier.model.soft import soft_of

NAME = "luthier_decode"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class Shared:
    """Keys and values by layer, (1, kv heads, end - begin, size), of tokens that several rows begin with."""

    begin: int
    end: int  # positions, a soft prompt's tokens included
    above: Shared | None = None
    kept: dict[int, Pair] = field(default_factory=dict)

    def path(self) -> list[Shared]:
        """All from the root down to this one."""
        return [*(self.above.path() if self.above else ()), self]


@dataclass
class Memory:
    """Own keys and values of up to `capacity` rows of up to `room` tokens; rows fill the slots from 0 without a gap."""

    capacity: int
    room: int
    lengths: list[int] = field(default_factory=list)  # own tokens kept, by slot
    stems: list[Shared | None] = field(default_factory=list)  # what each slot's row begins with
    own: dict[int, Pair] = field(default_factory=dict)  # by layer, (capacity, kv heads, room, size)
    places: torch.Tensor | None = None  # (capacity, room) each token's place in its row, where that is not its index

    def add(self, stem: Shared | None) -> int:
        """Give a new row the next slot."""
        if len(self.lengths) == self.capacity:
            raise ModelError("the memory of generation is full")
        self.lengths.append(0)
        self.stems.append(stem)
        return len(self.lengths) - 1

    def drop(self, slot: int) -> None:
        """Forget a row; the last slot's row takes its place, which is the only copy that a finished row costs."""
        last = len(self.lengths) - 1
        if slot != last:
            for key, value in self.own.values():
                key[slot, :, : self.lengths[last]] = key[last, :, : self.lengths[last]]
                value[slot, :, : self.lengths[last]] = value[last, :, : self.lengths[last]]
            if self.places is not None:
                self.places[slot] = self.places[last]
        self.lengths[slot], self.stems[slot] = self.lengths[last], self.stems[last]
        del self.lengths[last], self.stems[last]

    def layer(self, layer: int, like: torch.Tensor) -> Pair:
        """A layer's keys and values: zeros, as hidden numbers are multiplied too; pages not written to cost nothing."""
        if layer not in self.own:
            shape = (self.capacity, like.shape[1], self.room, like.shape[3])
            self.own[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.own[layer]


class Call:
    """One pass over some rows, as all layers' attention needs it; what is equal in all layers is made once."""

    def __init__(
        self,
        memory: Memory | None,
        stems: Sequence[Shared | None],
        starts: Sequence[int],
        new: int,
        *,
        first: int = 0,
        fills: Shared | None = None,
        sees: torch.Tensor | None = None,
        root: torch.Tensor | None = None,
    ) -> None:
        """Rows in slots `first`... with `starts` own tokens before `new` more; or the pass that `fills` a stem.

        `sees` (rows, new, slots) tells which own tokens may be seen, where rows hold trees; `root` (layers, 2,
        kv heads, k, size) stands for a stem's first k keys and values.
        """
        self.memory, self.new, self.first, self.fills, self.root = memory, new, first, fills, root
        self.stems, self.starts, self.sees = list(stems), list(starts), sees
        self.slots = max(starts) + new
        self.deepest = max(start + _end(stem) for start, stem in zip(starts, stems, strict=True)) + new
        self.causal = sees is None and not any(starts)
        self.below = _below(self.stems)
        self._masks: dict[Any, torch.Tensor | None] = {}

    @property
    def rows(self) -> int:
        return len(self.starts)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """Keep this pass's keys and values (rows, kv heads, new, size); return all own ones that may be seen."""
        if self.fills is not None:
            if self.root is not None:
                key, value = put_in_front(self.root[layer], key, value)
            self.fills.kept[layer] = (key, value)
            return key, value
        assert self.memory is not None, "a pass that fills no stem has rows"
        whole, rows = self.memory.layer(layer, key), slice(self.first, self.first + self.rows)
        mine = (whole[0][rows], whole[1][rows])
        if not any(self.starts):
            mine[0][:, :, : self.new], mine[1][:, :, : self.new] = key, value
            if self.causal:
                return key, value
        else:
            row, at = self.where(key.device)
            mine[0][row, :, at], mine[1][row, :, at] = key.transpose(1, 2), value.transpose(1, 2)
        return mine[0][:, :, : self.slots], mine[1][:, :, : self.slots]

    def where(self, device: torch.device) -> Pair:
        """Row and slot of each new token, both (rows, new)."""
        if not hasattr(self, "_at"):
            at = torch.tensor(self.starts, device=device)[:, None] + torch.arange(self.new, device=device)
            self._at = (torch.arange(self.rows, device=device)[:, None].expand_as(at), at)
        return self._at

    def visible(self, device: torch.device, window: int | None) -> torch.Tensor:
        """Boolean (rows, new, slots): which own tokens each new one may see."""
        at = self.where(device)[1]  # (rows, new)
        slots = torch.arange(self.slots, device=device)
        sees = self.sees if self.sees is not None else slots <= at[:, :, None]
        if window is None:
            return sees
        places = slots.expand(self.rows, -1)
        if self.memory is not None and self.memory.places is not None:
            places = self.memory.places[self.first : self.first + self.rows, : self.slots]
            at = places.gather(1, at)
        return sees & (at[:, :, None] - places[:, None] < window)

    def bias(self, like: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores of own tokens, (rows, 1, new, slots); None where all may be seen."""
        if "bias" not in self._masks:
            if self.sees is None and self.new == 1 and min(self.starts) == max(self.starts):
                self._masks["bias"] = None
            else:
                hidden = ~self.visible(like.device, None)
                bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
                self._masks["bias"] = bias.masked_fill_(hidden, float("-inf"))[:, None]
        return self._masks["bias"]

    def dense(self, device: torch.device, rows: Sequence[int], window: int | None, far: int) -> torch.Tensor:
        """Boolean (rows, 1, new, far + slots) for rows with one stem, of whose tokens the last `far` are looked at."""
        name = (tuple(rows), window, far)
        if name not in self._masks:
            at = self.where(device)[1]
            near = self.visible(device, window)
            if self.memory is not None and self.memory.places is not None:
                at = self.memory.places[self.first : self.first + self.rows].gather(1, at)
            past = at[:, :, None] + far - torch.arange(far, device=device)
            reach = past < window if window is not None else torch.ones_like(past, dtype=torch.bool)
            mask = torch.cat([reach, near], -1)[:, None]
            self._masks[name] = mask if len(rows) == self.rows else mask[list(rows)]
        found = self._masks[name]
        assert found is not None
        return found


def _end(stem: Shared | None) -> int:
    return stem.end if stem is not None else 0


def _below(stems: Sequence[Shared | None]) -> dict[Shared, list[int] | None]:
    """Which rows are below each stem, roots first; None: all of them."""
    found: dict[Shared, list[int]] = {}
    for row, leaf in enumerate(stems):
        for stem in leaf.path() if leaf else ():
            found.setdefault(stem, []).append(row)
    return {stem: rows if len(rows) < len(stems) else None for stem, rows in found.items()}


def decode_attention(
    module: Any,
    query: torch.Tensor,  # (rows, heads, new, size)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    memory: Call | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls while generating; returns (rows, new, heads, size)."""
    if memory is None:
        raise ModelError("decoding attention was called without its memory")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    own = memory.store(module.layer_idx, key, value)
    window = sliding_window if sliding_window is not None and memory.deepest > sliding_window else None
    if query.device.type == "cpu" and window is None:
        mixed = _cascade(query, own, memory, module.layer_idx, scale)
    else:
        mixed = _dense(query, own, memory, module.layer_idx, scale, window)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, decode_attention)


def _cascade(query: torch.Tensor, own: Pair, call: Call, layer: int, scale: float) -> torch.Tensor:
    """Own tokens in one call, each stem in one more for all rows below it; (rows, heads, new, size)."""
    if call.causal:
        near, lse = _flash(query, *own, 0.0, True, scale=scale)
    else:
        near, lse = _flash(query, *own, 0.0, False, attn_mask=call.bias(query), scale=scale)
    if not call.below:
        return near  # type: ignore[no-any-return]
    mixed: torch.Tensor = near.float()
    for stem, rows in call.below.items():
        asked = query if rows is None else query[rows]
        count, heads, new, size = asked.shape
        folded = asked.transpose(0, 1).reshape(1, heads, count * new, size)
        far, far_lse = _flash(folded, *stem.kept[layer], 0.0, False, scale=scale)
        far = far.view(heads, count, new, size).transpose(0, 1).float()
        far_lse = far_lse.view(heads, count, new).transpose(0, 1)
        here, here_lse = (mixed, lse) if rows is None else (mixed[rows], lse[rows])
        here = torch.lerp(here, far, torch.sigmoid(far_lse - here_lse).unsqueeze(-1))
        here_lse = torch.logaddexp(here_lse, far_lse)
        if rows is None:
            mixed, lse = here, here_lse
        else:
            mixed[rows], lse[rows] = here, here_lse
    return mixed.to(query.dtype)


def _dense(query: torch.Tensor, own: Pair, call: Call, layer: int, scale: float, window: int | None) -> torch.Tensor:
    """One call for all rows with the same stem, over keys laid side by side: for windows, and for other devices."""
    mixed = torch.empty_like(query)
    groups: dict[Shared | None, list[int]] = {}
    for row, stem in enumerate(call.stems):
        groups.setdefault(stem, []).append(row)
    for stem, rows in groups.items():
        every = len(rows) == call.rows
        asked, keys, values = (t if every else t[rows] for t in (query, *own))
        far = 0
        if stem is not None:
            first = max(0, stem.end - window) if window is not None else 0  # nothing before can be seen
            far = stem.end - first
            above = [
                torch.cat(pair, 2)[:, :, first:] for pair in zip(*(s.kept[layer] for s in stem.path()), strict=True)
            ]
            keys, values = (
                torch.cat([a.expand(len(rows), -1, -1, -1), b], 2) for a, b in zip(above, (keys, values), strict=True)
            )
        mask = call.dense(query.device, rows, window, far)
        grouped = asked.shape[1] != keys.shape[1]
        part = F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        if every:
            return part
        mixed[rows] = part
    return mixed


def begin_with(model: Any, ids: Sequence[int], above: Shared | None = None) -> Shared | None:
    """Compute what rows begin with below `above`; a root has the model's soft prompt in front. None: nothing at all."""
    soft = soft_of(model) if above is None else None
    begin = above.end if above is not None else 0
    stem = Shared(begin, begin + len(ids) + (soft.tokens if soft else 0), above)
    if stem.end == stem.begin:
        return above
    root = soft.key_values(model) if soft else None
    if root is not None and not ids:
        stem.kept = {layer: (pair[:1], pair[1:]) for layer, pair in enumerate(root)}
        return stem
    given = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
    inputs = soft.before(model, given) if soft else {"input_ids": given}
    call = Call(None, [above], [0], stem.end - stem.begin, fills=stem, root=root)
    _body(model, inputs, torch.arange(stem.begin, stem.end, device=model.device)[None], call)
    return stem


def forward(
    model: Any,
    ids: torch.Tensor,
    memory: Memory,
    *,
    first: int = 0,
    depths: torch.Tensor | None = None,
    sees: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the body on (rows, new) ids of the rows in slots `first`...; states (rows, new, hidden_size).

    The new tokens are kept behind each row's `lengths`, which the caller moves on by as many as are to stay. Where rows
    hold trees, `depths` (rows, new) are the new tokens' places in their rows, and `sees` (rows, new, slots) tells which
    own tokens each may see.
    """
    rows, new = ids.shape
    stems, starts = memory.stems[first : first + rows], memory.lengths[first : first + rows]
    call = Call(memory, stems, starts, new, first=first, sees=sees)
    ends = torch.tensor([_end(stem) for stem in stems], device=ids.device)[:, None]
    row, at = call.where(ids.device)
    if depths is not None and memory.places is None:
        memory.places = torch.arange(memory.room, device=ids.device).repeat(memory.capacity, 1)
    if memory.places is not None:
        memory.places[row + first, at] = at if depths is None else depths
    return _body(model, {"input_ids": ids}, ends + (at if depths is None else depths), call)


def _body(model: Any, inputs: dict[str, torch.Tensor], positions: torch.Tensor, call: Call) -> torch.Tensor:
    with attending(model, NAME):
        out = model.get_decoder()(**inputs, position_ids=positions, use_cache=False, memory=call)
    states: torch.Tensor = out.last_hidden_state
    return states
