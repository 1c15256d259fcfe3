"""Code that runs on the meta device, where tensors have shapes and no numbers, with every allocation written down.

The real forward and backward passes of a step run in a fraction of their time and almost without memory. What a method
keeps for its backward pass is therefore counted by letting it run, not by a table: a new method is right at once.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)  # need their indices' values
WORKING = "working"


@dataclass
class Log:
    """What ran: `events` are (number of a block, bytes) for an allocation and (number, 0) for its end."""

    events: list[tuple[int, int]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # of each block
    flops: Counter[str] = field(default_factory=Counter)  # by kind
    operations: int = 0
    first: Log | None = None  # what had been counted at `mark`: the forward pass of a step, the prompts of an answer

    def mark(self) -> None:
        """Remember what has been counted so far."""
        self.first = Log(flops=self.flops.copy(), operations=self.operations)

    def live(self) -> dict[int, int]:
        """Blocks that are alive at the end, with their bytes."""
        alive: dict[int, int] = {}
        for block, size in self.events:
            if size:
                alive[block] = size
            else:
                del alive[block]
        return alive

    def bytes_of(self, kind: str) -> int:
        """Bytes of a kind that are alive at the end."""
        return sum(size for block, size in self.live().items() if self.kinds[block] == kind)


class Rehearsal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, operations run on the meta device and are logged; real tensors stay real among themselves.

    Floating numbers made without an input (zeros, empty) are made on the meta device too, so that code that is written
    for one device runs unchanged. A single value that is asked for is zero, a mask selects everything, and shapes that
    depend on other values cannot be rehearsed: torch raises.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), *, redirect: bool = True) -> None:
        """`known` are tensors that exist already and are not counted; `redirect` makes new tensors meta ones."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.log, self._kind, self._redirect = Log(), WORKING, redirect
        self._blocks: dict[int, tuple[int, Any]] = {}  # by storage: block number, weak reference
        for tensor in known:
            self._blocks[tensor.untyped_storage()._cdata] = (-1, tensor.untyped_storage())

    @contextmanager
    def named(self, kind: str) -> Iterator[None]:
        """Inside, new blocks and operations are of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def rename(self, kind: str, tensors: Iterable[torch.Tensor | None] | None = None) -> None:
        """Say what the blocks under these tensors are; without tensors, all unnamed blocks that are alive."""
        if tensors is None:
            blocks: Iterable[int] = (block for block, _ in self._blocks.values())
            chosen = [block for block in blocks if block >= 0 and self.log.kinds[block] == WORKING]
        else:
            found = (self._blocks.get(t.untyped_storage()._cdata, (-1, None))[0] for t in tensors if t is not None)
            chosen = [block for block in found if block >= 0]
        for block in chosen:
            self.log.kinds[block] = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _together(func, args, kwargs or {})
        out = self._run(func, args, kwargs)
        if packet := _WITHIN.get(func.overloadpacket):
            self._pass(packet(*args))
        for tensor in _tensors((out,)):
            if tensor.is_meta:
                self._note(tensor)
        count = COUNTED.get(func.overloadpacket)
        if count is not None:
            self.log.flops[self._kind] += count(*args, **kwargs, out_val=out)
        self.log.operations += func not in _VIEWS
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation; what it makes of nothing, or copies from a meta tensor, is a meta tensor too."""
        first = next(_tensors((*args, *kwargs.values())), None)
        if first is not None and first.is_meta and func is aten._local_scalar_dense.default:
            return 0  # asked whether something is wrong with its values: it is not
        if func is aten.index.Tensor and first is not None and first.is_meta:
            args = (first, [_everything(index) for index in args[1]])
        if not self._redirect or not _takes_device(func) or not (first is None or first.is_meta):
            return func(*args, **kwargs)
        out = func(*args, **{**kwargs, "device": torch.device("meta")})
        numbers = first is not None or (out.is_floating_point() and out.numel() > 1)
        return out if numbers else func(*args, **kwargs)  # positions, masks, dice: code asks for their values

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._blocks or not size:
            return
        block = len(self.log.kinds)
        self.log.kinds.append(self._kind)
        self.log.events.append((block, size))
        log, blocks = self.log, self._blocks

        def gone(_: Any) -> None:
            del blocks[key]
            log.events.append((block, 0))

        self._blocks[key] = (block, weakref.ref(storage, gone))

    def _pass(self, size: int) -> None:
        """Note a block that lives only inside an operation's kernel."""
        block = len(self.log.kinds)
        self.log.kinds.append(self._kind)
        self.log.events += [(block, size), (block, 0)]


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results: plain, or in lists (never deeper)."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (inner for inner in value if isinstance(inner, torch.Tensor))


def _everything(index: torch.Tensor | None) -> torch.Tensor | None:
    """A mask whose values are not there selects all of its row: the most that it can."""
    if index is None or not index.is_meta or index.dtype != torch.bool or index.dim() != 1:
        return index
    return torch.empty(len(index), dtype=torch.long, device="meta")


def _together(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Bring all inputs to the meta device where at least one is there."""
    meta = [tensor.is_meta for tensor in _tensors((*args, *kwargs.values()))]
    if not any(meta) or all(meta) or func.overloadpacket in INDEXING:
        return args, kwargs
    return _to_meta(args), {name: _to_meta(value) for name, value in kwargs.items()}


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.to("meta")
    return type(value)(map(_to_meta, value)) if type(value) in (tuple, list) else value


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _flash(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    rows, heads, length, width = query.shape
    return int(4 * rows * heads * length * key.shape[2] * width * (0.5 if causal else 1))


def _flash_back(grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, dropout: float, causal: bool,
                **_: Any) -> int:  # fmt: skip
    return int(2.5 * _flash(query, key, value, dropout, causal))


def _by_shape(count: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_val=None, **kwargs: count(*args, **kwargs)


COUNTED: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],  # torch counts only the form that makes a new tensor
    aten._scaled_dot_product_flash_attention_for_cpu: _by_shape(_flash),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _by_shape(_flash_back),
}
_WITHIN = {aten.logsumexp: lambda x, *_: x.nbytes}  # what kernels allocate on the way, as read in torch's source
_VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.t.default, aten.transpose.int, aten.slice.Tensor,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.detach.default, aten.select.int,
    aten.split.Tensor, aten.alias.default, aten.permute.default,
}  # fmt: skip


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let scaled_dot_product_attention keep what the fused kernels of CPU and GPU keep.

    On the meta device torch would fall back to the textbook form, which keeps a (tokens, tokens) array per head.
    """

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = query.new_empty(attn_mask.shape)  # kernels take it as numbers
        out: torch.Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend):
        yield
