"""Where AdamW keeps its moments: torch in float32, or bitsandbytes in 8 bits and in memory that pages.

Each kind works on contiguous slices of one flat master and shows its moments as plain tensors, so that a checkpoint
holds them and a resumed run goes on with the same bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.errors import SpecError
from luthier.spec import TrainSpec

BLOCK = 256  # 8-bit moments that share one float32 constant
BYTES = {  # of moments, per trained number: two float32s, or two bytes and two constants a block
    "adamw": 8.0,
    "adamw8bit": 2 + 8 / BLOCK,
    "paged_adamw": 8.0,
    "paged_adamw8bit": 2 + 8 / BLOCK,
}


@dataclass(frozen=True)
class Slice:
    """Part of the flat master with settings of its own; `parameter` shares memory with it and carries its gradient."""

    parameter: torch.nn.Parameter
    lr_scale: float
    weight_decay: float


@dataclass(frozen=True)
class Moments:
    """An optimiser that steps the slices, its moments by name, and how to tell it which step it is at."""

    optimiser: torch.optim.Optimizer
    tensors: dict[str, torch.Tensor]
    set_step: Callable[[torch.Tensor], None]


def settle(name: str, device: torch.device | str) -> tuple[str, str]:
    """The optimiser that runs on a device for the one asked for, and a note where it is another one.

    Paging changes where moments lie and no number; outside CUDA they lie in the host's memory already.
    """
    kind, plain = torch.device(device).type, name.removeprefix("paged_")
    if plain == name or kind == "cuda":
        return name, ""
    return plain, f"train.optimizer: {name} runs as {plain}: without CUDA there is no GPU memory to page from"


def require(name: str, device: torch.device | str) -> list[str]:
    """Refuse, before anything is loaded, an optimiser that cannot run here; return notes on one that runs otherwise."""
    used, note = settle(name, device)
    kind = torch.device(device).type
    if used != "adamw" and kind not in ("cpu", "cuda"):
        what = f"{used} runs on CPU and CUDA, not on {kind}"
        raise SpecError(what, where="train.optimizer", remedy="train.optimizer=adamw")
    if used != "adamw" and not importlib.util.find_spec("bitsandbytes"):
        remedy = "pip install 'luthier[quantize]', or train.optimizer=adamw"
        raise SpecError(f"{used} needs bitsandbytes", where="train.optimizer", remedy=remedy)
    return [note] if note else []


def make(slices: Sequence[Slice], settings: TrainSpec) -> Moments:
    """Moments of the kind that the task asks for, all zero."""
    name, _ = settle(settings.optimizer, slices[0].parameter.device)
    return _torch(slices, settings) if name == "adamw" else _bitsandbytes(name, slices, settings)


def _groups(slices: Sequence[Slice]) -> list[dict[str, object]]:
    return [{"params": [part.parameter], "weight_decay": part.weight_decay} for part in slices]


def _torch(slices: Sequence[Slice], settings: TrainSpec) -> Moments:
    device = slices[0].parameter.device
    fused = device.type in {"cpu", "cuda", "mps", "xpu"}
    optimiser = torch.optim.AdamW(_groups(slices), betas=settings.betas, fused=fused)
    size = sum(part.parameter.numel() for part in slices)
    tensors = {name: torch.zeros(size, device=device) for name in ("exp_avg", "exp_avg_sq")}
    start = 0
    for part in slices:
        here = slice(start, start := start + part.parameter.numel())
        step = torch.zeros((), dtype=torch.float32, device=device if fused else "cpu")
        optimiser.state[part.parameter] = {"step": step, **{name: flat[here] for name, flat in tensors.items()}}

    def set_step(done: torch.Tensor) -> None:
        for held in optimiser.state.values():
            held["step"].copy_(done)

    return Moments(optimiser, tensors, set_step)


def _bitsandbytes(name: str, slices: Sequence[Slice], settings: TrainSpec) -> Moments:
    """AdamW of bitsandbytes; its blocks of 256 moments run over the flat slices, not over single tensors."""
    from bitsandbytes import optim as optimisers

    optim: Any = optimisers
    kinds = {"adamw8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw8bit": optim.PagedAdamW8bit}
    optimiser = kinds[name](_groups(slices), betas=settings.betas)
    tensors = {}
    for index, (part, group) in enumerate(zip(slices, optimiser.param_groups, strict=True)):
        optimiser.init_state(group, part.parameter, index, 0)
        held = optimiser.state[part.parameter]
        for key in ("state1", "state2", "absmax1", "absmax2"):  # slices below 4,096 numbers stay in float32
            if key in held:
                tensors[f"{key}.{index}"] = held[key]

    def set_step(done: torch.Tensor) -> None:
        for held in optimiser.state.values():
            held["step"] = int(done)

    return Moments(optimiser, tensors, set_step)
