"""Adapters folded into the weights while many prompts are answered, and taken out again bit for bit.

An attached LoRA adds two narrow products and their passes to every linear layer. Folded, a tuned model answers as fast
as its base. The base's own tensors are kept aside and put back, as subtracting the update would not give their bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from luthier.model import quantize, stems

WORTH_TOKENS = 4096  # computed tokens from which folding repays its copies and its proof
PROBES, PROBE_TOKENS = 4, 32
# Folded weights round W + s B A once, attached ones round the two products apart. Bounds on the mean absolute
# difference of log-probabilities in nats, as in `luthier export`.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
ROOM = 1.5  # free memory that is asked for, in sizes of the copies


@dataclass(frozen=True)
class Folding:
    """Whether the adapter is in the weights now; `why` not, where it was tried and found wanting."""

    folded: bool
    why: str = ""


def work(prompts: Sequence[Sequence[int]], new: int) -> int:
    """Tokens that a model computes to answer prompts with up to `new` tokens each, shared beginnings once."""
    found = stems.find(prompts)
    shared = sum(stem.end - stem.begin for stem in found.stems)
    own = (len(p) - (found.stems[leaf].end if leaf >= 0 else 0) for p, leaf in zip(prompts, found.leaf, strict=True))
    return shared + sum(own) + len(prompts) * new


@contextmanager
def folded(model: Any, prompts: Sequence[Sequence[int]], new: int, *, least: int = WORTH_TOKENS) -> Iterator[Folding]:
    """Inside, an adapter of PEFT's kind is in the weights, if there is work enough and the answers stay the same.

    Parity is proved on the ends of a few prompts: log-probabilities within TOLERANCE and the same next token, else the
    adapter stays attached and the reason is told. Afterwards the model is what it was, bit for bit.
    """
    layers = _layers(model)
    if not layers or work(prompts, new) < least or not _room(layers):
        yield Folding(False)
        return
    probes = [list(p[-PROBE_TOKENS:]) for p in prompts[:: max(1, len(prompts) // PROBES)][:PROBES]]
    attached = [_logprobs(model, ids) for ids in probes]
    kept = _Kept(layers)
    try:
        why = kept.fold() or _differs(attached, [_logprobs(model, ids) for ids in probes], TOLERANCE[model.dtype])
        if why:
            kept.restore()
        yield Folding(not why, why)
    finally:
        kept.restore()


class _Kept:
    """Layers of an adapter and all that folding changes in them."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        parameters = {id(p): p for layer in layers for p in layer.get_base_layer().parameters()}
        self.own = [(p, p.data) for p in parameters.values()]
        self.forwards = [layer.__dict__.get("forward") for layer in layers]
        self.caches = [dict(layer._caches) if hasattr(layer, "_caches") else None for layer in layers]

    @torch.no_grad()
    def fold(self) -> str:
        """Write base plus update into copies; returns why that cannot be done, or nothing."""
        for parameter, own in self.own:
            parameter.data = own.clone()
        for layer in self.layers:
            try:
                layer.merge()
            except (ValueError, RuntimeError, NotImplementedError) as error:
                return f"{type(layer).__name__} cannot be folded: {error}"
            layer.forward = layer.get_base_layer().forward  # PEFT's own would ask the same questions at every call
        return ""

    def restore(self) -> None:
        """Put everything back; a second time changes nothing."""
        for parameter, own in self.own:
            parameter.data = own
        for layer, forward, caches in zip(self.layers, self.forwards, self.caches, strict=True):
            layer.merged_adapters.clear()
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
            if caches is not None:
                layer._caches = caches


def _layers(model: Any) -> list[Any]:
    """The layers of an adapter, if all may be folded: switched on, not folded yet, on plain weights of their own."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.disable_adapters or layer.merged for layer in layers) or quantize.found(model):
        return []
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    tied = any(users[id(p)] > 1 for layer in layers for p in layer.get_base_layer().parameters())
    return [] if tied else layers


def _room(layers: Sequence[Any]) -> bool:
    import psutil

    size = sum(p.nbytes for layer in layers for p in layer.get_base_layer().parameters())
    device = next(layers[0].get_base_layer().parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return bool(free > ROOM * size)


@torch.inference_mode()
def _logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (tokens, vocabulary) in float32."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float(), -1)


def _differs(attached: Sequence[torch.Tensor], now: Sequence[torch.Tensor], bound: float) -> str:
    """In what two models' answers differ; empty where they agree."""
    off = max(float((a - b).abs().mean()) for a, b in zip(attached, now, strict=True))
    if not off <= bound:
        return f"log-probabilities of the folded adapter are off by {off:.2g} nats on average (bound {bound:g})"
    if any(int(a[-1].argmax()) != int(b[-1].argmax()) for a, b in zip(attached, now, strict=True)):
        return "the folded adapter chooses another next token"
    return ""
