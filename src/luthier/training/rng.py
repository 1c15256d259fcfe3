"""Random state as plain integers and bytes: captured, restored, and set aside while something else draws."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

# Where every generator stands, as tensors of fixed shape: 'torch.cpu' (and 'torch.cuda' ...) uint8, 'python' and
# 'numpy' int64 words, 'gauss' float64 (the halves of normal pairs that Python and NumPy keep; nan for none).
RandomState = Mapping[str, torch.Tensor]


def seed_all(seed: int, *, branch: int = 0) -> None:
    """Start Python's, NumPy's and torch's generators from one number; branches of it are independent."""
    words = np.random.SeedSequence([seed, branch]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def capture(device: torch.device) -> RandomState:
    """Read every generator that can touch training on `device`."""
    state = {"torch.cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[f"torch.{device.type}"] = torch.get_device_module(device).get_rng_state()
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state["python"] = torch.tensor(words, dtype=torch.int64)
    state["numpy"] = torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64)
    state["gauss"] = torch.tensor([math.nan if gauss is None else gauss, cached], dtype=torch.float64)
    return state


def restore(state: RandomState, device: torch.device) -> None:
    """Put every generator back to where `capture` found it."""
    torch.set_rng_state(state["torch.cpu"])
    if device.type != "cpu" and f"torch.{device.type}" in state:
        torch.get_device_module(device).set_rng_state(state[f"torch.{device.type}"])
    gauss, cached = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))


@contextmanager
def aside(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, everything draws from generators of its own; outside, nothing has happened."""
    before = capture(device)
    try:
        seed_all(seed)
        yield
    finally:
        restore(before, device)
