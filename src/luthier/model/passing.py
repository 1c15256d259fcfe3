"""Layers that let their input through: how a forward pass begins or ends at a layer, whatever the family calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The decoder's layers, lowest first; empty where the body has no one list of them."""
    body = model.get_decoder()
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [child for child in body.children() if isinstance(child, torch.nn.ModuleList) and len(child) == count]
    return list(lists[0]) if len(lists) == 1 else []


@contextmanager
def passing(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, these layers return what they are given and cost nothing. They keep their places, so indices hold."""
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _through  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.forward = own


def _through(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states
