"""States that a base's frozen lower layers give, computed once for every token and read in each epoch, trial and look.

Where only the head, the top layers or adapters above a layer learn, what enters the lowest learning layer never
changes. It is computed before the first step, over all rows at once (which also shares more than a step's rows do),
and kept in memory by the path of token ids that leads to each token; packs may then put rows together in any way.
Exact up to rounding: a product over other rows may differ in its last bits. A resumed run computes the same again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from luthier.model.attention import attending, shares_prefixes
from luthier.model.batch import Batch, Entry
from luthier.model.logprob import hidden_states
from luthier.model.passing import layers_of, passing
from luthier.model.soft import soft_of
from luthier.records import IntArray, Pack, Rendered
from luthier.text import pack as packing

# Largest difference of the final states, as a share of their largest value, that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}
PROBE = Rendered((0, 0, 0), (0.0, 0.0, 1.0), 2, "probe")


@dataclass
class Frozen:
    """Kept states (tokens, hidden_size) at the entry of layer `depth`, and where each row's tokens are in them."""

    depth: int
    states: torch.Tensor
    slots: dict[bytes, IntArray]

    def entry(self, pack: Pack) -> Entry | None:
        """The states of a pack's tokens; None where one of its rows is not kept."""
        index = np.empty(len(pack), np.int64)
        for path in packing.paths(pack):
            slots = self.slots.get(_key(pack.ids[path]))
            if slots is None:
                return None
            index[path] = slots
        return Entry(self.depth, self.states.index_select(0, torch.from_numpy(index).to(self.states.device)))

    @property
    def bytes(self) -> int:
        return self.states.nbytes


def depth(model: Any) -> int:
    """Count the lowest layers whose output depends on nothing that learns, as autograd says; 0: none can be kept.

    Dropout below, soft prompts and models that cannot share prefixes leave nothing to keep.
    """
    layers = layers_of(model)
    if not layers or shares_prefixes(model) or soft_of(model) is not None:
        return 0
    learns: list[bool] = []

    def look(module: Any, args: Any, out: Any) -> None:
        learns.append(not isinstance(out, torch.Tensor) or out.requires_grad)

    hooks = [layer.register_forward_hook(look) for layer in layers]
    training = [module for module in model.modules() if module.training]
    try:
        with torch.enable_grad():
            model.eval()
            (probe,) = packing.plan([PROBE], budget=len(PROBE.ids))
            hidden_states(model, Batch.of(probe, model.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    count = learns.index(True) if True in learns else len(layers)
    return 0 if _drops_out(model, layers[count:]) else count


def keep(model: Any, packs: Sequence[Pack], count: int) -> Frozen:
    """Run the lowest `count` layers over packs, each unique token of a pack once, and keep what they give."""
    total, start = sum(len(pack) for pack in packs), 0
    states = torch.empty(total, model.config.get_text_config().hidden_size, dtype=model.dtype, device=model.device)
    slots: dict[bytes, IntArray] = {}
    for pack in packs:
        states[start : start + len(pack)] = _lower(model, Batch.of(pack, model.device), count)
        for path in packing.paths(pack):
            slots.setdefault(_key(pack.ids[path]), start + path)
        start += len(pack)
    return Frozen(count, states, slots)


@torch.no_grad()
def differs(model: Any, kept: Frozen, pack: Pack) -> str:
    """Why a model's states cannot be entered at a layer (it scales or adds to what it is given), or an empty string."""
    batch = Batch.of(pack, model.device)
    with _evaluating(model):
        usual = hidden_states(model, batch)
        try:
            entered = hidden_states(model, batch.entered(kept.entry(pack)))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            return f"{type(model).__name__} cannot be entered at layer {kept.depth} ({type(error).__name__})"
    gap = float((usual - entered).abs().max() / usual.abs().max().clamp_min(1e-12))
    if gap <= TOLERANCE.get(model.dtype, 0.06):
        return ""
    return f"{type(model).__name__} changes what enters layer {kept.depth} (a difference of {gap:.2g})"


@torch.no_grad()
def _lower(model: Any, batch: Batch, count: int) -> torch.Tensor:
    """States (tokens, hidden_size) after the lowest `count` layers."""
    layers = layers_of(model)
    found: list[torch.Tensor] = []
    hook = layers[count - 1].register_forward_hook(lambda module, args, out: found.append(out[0]))
    try:
        with _evaluating(model), attending(model), passing(layers[count:]):
            model.get_decoder()(input_ids=batch.ids, position_ids=batch.positions, tree=batch.tree, use_cache=False)
    finally:
        hook.remove()
    (states,) = found
    return states


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Nothing drops out inside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _drops_out(model: Any, above: Sequence[torch.nn.Module]) -> bool:
    """Whether training draws numbers below the kept layers: then no two epochs see the same states."""
    upper = {id(module) for layer in above for module in layer.modules()}
    config = model.config.get_text_config()
    if float(getattr(config, "attention_dropout", 0.0) or 0.0):
        return True
    body = model.get_decoder()
    return any(isinstance(m, torch.nn.Dropout) and m.p > 0 and id(m) not in upper for m in body.modules())


def _key(ids: IntArray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, np.int64).tobytes(), digest_size=16).digest()
