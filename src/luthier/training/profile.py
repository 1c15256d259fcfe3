"""What a training step computes and where its time goes: real steps, every operation seen once.

A dispatch mode hears of each operation, says which part of the step it belongs to, and times it (on CUDA the profiler
times its kernels). Nothing here knows a method: whatever a step multiplies is counted, by shape. What a step *needs* is
less: recomputed activations are not counted, the head only where something is predicted, and attention only over what
each token may see.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from luthier.contracts import Adapted
from luthier.model import attention, quantize
from luthier.model.limit import Product
from luthier.records import Loss, Pack
from luthier.training.feed import Feed, StepBatch

if TYPE_CHECKING:
    from luthier.training.loop import Training

aten: Any = torch.ops.aten
FORWARD, BACKWARD, ADAPTER, ATTENTION = "base_forward", "base_backward", "adapter", "attention"
HEAD, ELEMENTWISE, OPTIMISER, DATA, RECOMPUTED, REST = "head", "elementwise", "optimiser", "data", "recomputed", "rest"
PARTS = (FORWARD, BACKWARD, ADAPTER, ATTENTION, HEAD, ELEMENTWISE, RECOMPUTED, OPTIMISER, DATA, REST)
ATTENDING = ("scaled_dot_product", "flash_attention", "efficient_attention")  # in the names of torch's own kernels
STACKED = 4
KEY = "luthier"  # of a mark on an autograd node, and before the names of the profiler's ranges


# operation: where its two matrices stand among its arguments
MULTIPLIES: dict[Any, tuple[int, int]] = {
    aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2), aten.baddbmm: (1, 2),
    aten.baddbmm_: (1, 2),
}  # fmt: skip


@dataclass
class Seen:
    """One watched step: seconds and operations by part, products by part and shape, calls of attention."""

    wall: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: Counter[str] = field(default_factory=Counter)  # of products; attention's own kernels are not among them
    products: Counter[tuple[str, Product]] = field(default_factory=Counter)
    attended: int = 0
    learnt: int = 0  # attention calls that a gradient runs through
    operations: int = 0

    def parts(self) -> dict[str, float]:
        """Seconds by part; they add up to the step: what no operation took is `rest`."""
        told = {part: self.seconds[part] for part in PARTS if self.seconds[part]}
        return {**told, REST: max(0.0, self.wall - sum(told.values()))}

    def base_products(self) -> dict[Product, float]:
        """What the base itself multiplies, head included, by shape: what the machine's limit is measured on."""
        found: Counter[Product] = Counter()
        for (part, product), times in self.products.items():
            if part in (FORWARD, BACKWARD, HEAD):
                found[product] += times
        return dict(found)


class Watch(TorchDispatchMode):
    """Inside `watching()`, the operations of a training's steps are seen; outside, nothing is changed."""

    def __init__(self, training: Training, adapted: Adapted, base: set[frozenset[int]]) -> None:
        """Follow a training; its steps run as before. `base` are the sizes of the base's matrices before attaching."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._model: Any = adapted.model
        self._device = training.device
        self._ranges = training.device.type == "cuda"  # kernels are timed by the profiler, in ranges that have names
        self._vocabulary = int(adapted.model.config.get_text_config().vocab_size)
        beside = matrices(adapted.model) - base
        self._base, self._adapter = base, {sizes for one in beside for sizes in _stacked(one)} - base
        self._thin = max((min(sizes) for sizes in beside), default=0)
        self._phase = OPTIMISER  # | data | forward
        self._depth = self._attending = self._tokens = 0
        self._active, self._laying_out = False, 0.0
        self._now = Seen()
        self.seen: list[Seen] = []
        self.packs: Sequence[Pack] = ()  # of the step that ran last
        self._follow(training)

    def _follow(self, training: Training) -> None:
        """Hear when a step's rows are laid out and when its loss is taken."""
        training.feed = _Timed(training.feed, self)
        loss_of = training._loss_of

        def watched(pack: Pack) -> Loss:
            self._phase, self._laying_out, self._tokens = DATA, time.perf_counter(), len(pack)
            try:
                return loss_of(pack)
            finally:
                self._phase = OPTIMISER  # unless an autograd node says that it is the backward pass

        training._loss_of = watched

    @contextlib.contextmanager
    def watching(self) -> Iterator[Seen]:
        """See one step; afterwards it is the last of `seen`."""
        self._now, self._active = Seen(), True
        hooks = (
            torch.nn.modules.module.register_module_forward_pre_hook(self._enter),
            torch.nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        )
        profiler = _profiler() if self._ranges else contextlib.nullcontext()
        try:
            with profiler as kernels, self._told_of_attention(), self:
                begun = time.perf_counter()
                yield self._now
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                self._now.wall = time.perf_counter() - begun
        finally:
            self._active = False
            for hook in hooks:
                hook.remove()
        if kernels is not None:
            self._now.seconds |= _kernel_seconds(kernels)
        self.seen.append(self._now)

    def laid_out(self, seconds: float) -> None:
        """Add time that the data took."""
        if self._active:
            self._now.seconds[DATA] += seconds

    def _enter(self, module: Any, inputs: Any) -> None:
        if self._phase == DATA:
            self.laid_out(time.perf_counter() - self._laying_out)
            self._phase = FORWARD
        self._depth += 1

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        self._depth -= 1

    @contextlib.contextmanager
    def _told_of_attention(self) -> Iterator[None]:
        """Know what runs inside the tree's attention, and mark its nodes for the backward pass."""
        from transformers import AttentionInterface

        usual = attention.tree_attention

        def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            again = torch._C._current_autograd_node() is not None
            self._attending += 1
            try:
                with self._unseen(RECOMPUTED if again else ATTENTION):
                    mixed, weights = usual(module, query, key, value, *args, **kwargs)
            finally:
                self._attending -= 1
            if not again:
                self._now.attended += 1
                self._now.learnt += mixed.grad_fn is not None
            _mark(mixed.grad_fn, {tensor.grad_fn for tensor in (query, key, value)}, ranges=self._ranges)
            return mixed, weights

        AttentionInterface.register(attention.NAME, attend)
        try:
            yield
        finally:
            AttentionInterface.register(attention.NAME, usual)

    @contextlib.contextmanager
    def _unseen(self, part: str) -> Iterator[None]:
        """On CUDA a part runs in one range and out of the mode's sight, which compiled attention does not bear."""
        if not self._ranges:
            yield
            return
        with torch.profiler.record_function(f"{KEY}.{part}"), _disable_current_modes():
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._phase == DATA:  # timed as a whole
            return func(*args, **(kwargs or {}))
        part = self._part(func, args)
        now = self._now
        now.operations += 1
        if self._ranges:
            node: Any = torch._C._current_autograd_node()
            if node is not None and node.metadata.get(KEY):
                return func(*args, **(kwargs or {}))  # its node has a range
            with torch.profiler.record_function(f"{KEY}.{part}"):
                return func(*args, **(kwargs or {}))
        begun = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        now.seconds[part] += time.perf_counter() - begun
        return out

    def _part(self, func: Any, args: Any) -> str:
        """The part of the step that an operation belongs to; a product is counted on the way."""
        node: Any = torch._C._current_autograd_node()
        if node is None and self._phase == OPTIMISER:
            return OPTIMISER
        again = node is not None and self._depth > 0
        if self._attending or (node is not None and node.metadata.get(KEY)) or _attends(func):
            return RECOMPUTED if again else ATTENTION
        matrices = MULTIPLIES.get(func.overloadpacket)
        if matrices is None:
            wide = any(isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] == self._vocabulary for t in args)
            return RECOMPUTED if again else HEAD if wide else ELEMENTWISE
        left, right = (args[place] for place in matrices)
        product, times = Product(left.shape[-2], left.shape[-1], right.shape[-1]), left[..., 0, 0].numel()
        part = RECOMPUTED if again else self._part_of(product, node is not None)
        self._now.products[part, product] += times
        self._now.flops[part] += times * product.flops
        return part

    def _part_of(self, product: Product, backward: bool) -> str:
        """Whose product this is, by its sizes: two of them are a weight's, the third is the number of tokens."""
        sizes = [product.rows, product.inner, product.columns]
        if self._vocabulary in sizes:
            return HEAD
        if self._tokens in sizes:
            sizes.remove(self._tokens)
        pairs = {frozenset(pair) for pair in itertools.combinations(sizes, 2)}
        if not pairs & self._base and (pairs & self._adapter or min(sizes) <= self._thin):
            return ADAPTER
        return BACKWARD if backward else FORWARD


class _Timed:
    """A feed whose time is told to a watch."""

    def __init__(self, feed: Feed, watch: Watch) -> None:
        self._feed, self._watch = feed, watch
        self.total_steps, self.steps_per_epoch = feed.total_steps, feed.steps_per_epoch

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        begun, before = time.perf_counter(), self._watch._phase
        self._watch._phase = DATA
        try:
            batch = next(self._feed)
            self._watch.packs = batch.packs
            return batch
        finally:
            self._watch._phase = before
            self._watch.laid_out(time.perf_counter() - begun)

    def state(self) -> dict[str, Any]:
        return self._feed.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._feed.restore(state)


def _stacked(sizes: frozenset[int]) -> Iterator[frozenset[int]]:
    """A matrix's sizes, and those of up to four such matrices in one product, as layers with one input are run."""
    for times in range(1, STACKED + 1):
        yield frozenset((min(sizes) * times, max(sizes)))


def matrices(model: Any) -> set[frozenset[int]]:
    """The sizes of a model's matrices, packed or plain."""
    packed = {id(m.weight): (m.in_features, m.out_features) for m in quantize.layers(model).values()}
    sizes = (packed.get(id(weight), tuple(weight.shape)) for weight in (*model.parameters(), *model.buffers()))
    return {frozenset(shape) for shape in sizes if len(shape) == 2}


def _attends(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return any(word in name for word in ATTENDING)


def _mark(node: Any, ends: set[Any], *, ranges: bool) -> None:
    """Mark the autograd nodes between attention's result and its inputs; with `ranges` each runs in one."""
    todo = [node]
    while todo:
        one = todo.pop()
        if one is None or one in ends or one.metadata.get(KEY):
            continue
        one.metadata[KEY] = True
        if ranges:
            _in_range(one)
        todo += [before for before, _ in one.next_functions]


def _in_range(node: Any) -> None:
    """Let a node of the backward pass run in attention's range of the profiler."""
    opened: list[Any] = []

    def begin(grads: Any) -> None:
        opened.append(torch.profiler.record_function(f"{KEY}.{ATTENTION}"))
        opened[-1].__enter__()

    def end(inputs: Any, outputs: Any) -> None:
        opened.pop().__exit__(None, None, None)

    node.register_prehook(begin)
    node.register_hook(end)


def _profiler() -> Any:
    return torch.profiler.profile()  # of all that this machine has


def _kernel_seconds(profiler: Any) -> dict[str, float]:
    """Seconds of the kernels that were launched inside each part's ranges."""
    found = {event.key: event.device_time_total / 1e6 for event in profiler.key_averages()}
    return {part: found[f"{KEY}.{part}"] for part in PARTS if f"{KEY}.{part}" in found}
