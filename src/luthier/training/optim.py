"""One flat float32 master copy of whatever learns, and schedules as pure functions of the step.

A LoRA adapter is some 400 small tensors. Kept flat, one fused call updates them, one norm clips them, and sums of
bf16 gradients are taken in float32 (performance section 4). The model's own (often bf16) parameters are rewritten
from the master after every step, so small updates are never rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from luthier.errors import CheckpointError, TrainingError
from luthier.spec import TrainSpec
from luthier.training import moments

Stepped = Callable[[Mapping[str, torch.Tensor]], Sequence[str]]


def scale(step: int, total: int, *, schedule: str, warmup: float) -> float:
    """Learning rate of the 0-based `step` as a share of the peak: a linear rise, then cosine, linear or constant."""
    rising = min(math.ceil(warmup * total), max(0, total - 1))
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - rising) / max(1, total - rising))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class _Place:
    """Where a parameter lives in the flat buffer."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    shape: tuple[int, ...]

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.parameter.numel())


class Master:
    """The float32 truth of the trainable parameters and their gradient sum, each one flat tensor; and their moments."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        settings: TrainSpec,
        groups: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        if not parameters:
            raise TrainingError("nothing is trainable", remedy="choose a method that adds or frees parameters")
        self.settings = settings
        wishes = {name: _wish(name, groups or {}, settings) for name in parameters}
        # Sorting by wish makes each group one contiguous slice; by name makes the layout the same in every process.
        ordered = sorted(parameters, key=lambda name: (wishes[name], name))
        self.places: list[_Place] = []
        start = 0
        for name in ordered:
            self.places.append(_Place(name, parameters[name], start, tuple(parameters[name].shape)))
            start += parameters[name].numel()
        device = self.places[0].parameter.device
        self.master = torch.cat([p.parameter.detach().reshape(-1).to(device, torch.float32) for p in self.places])
        self.grad = torch.zeros_like(self.master)
        self.optimiser_step = torch.zeros((), dtype=torch.float32, device=device)
        self._views = [
            (p.parameter, self.master[p.slice].view(p.shape), self.grad[p.slice].view(p.shape)) for p in self.places
        ]
        slices = self._slices(wishes)
        self._lr_scales = [part.lr_scale for part in slices]
        self._moments = moments.make(slices, settings)

    def __len__(self) -> int:
        return self.master.numel()

    @property
    def layout(self) -> list[list[object]]:
        """Names and shapes in flat order: what a saved master can be checked against."""
        return [[place.name, list(place.shape)] for place in self.places]

    @torch.no_grad()
    def collect(self) -> None:
        """Add the parameters' gradients into the float32 sum and clear them."""
        for parameter, _, total in self._views:
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

    def discard(self) -> None:
        """Forget gradients that were collected or are still on the parameters."""
        self.grad.zero_()
        self.drop()

    def drop(self) -> None:
        """Forget gradients that are still on the parameters."""
        for parameter, _, _ in self._views:
            parameter.grad = None

    @torch.no_grad()
    def step(self, count: float, rate: float, stepped: Stepped | None = None) -> float:
        """Divide the gradient sum by `count`, clip, update at learning rate `rate`, write back; return the norm.

        The norm is the one before clipping. A norm that is not finite changes nothing: the caller decides. `stepped`
        sees the gradients by name after the update; the parameters that it says it changed are read back.
        """
        self.grad.div_(count)
        norm = float(torch.linalg.vector_norm(self.grad))
        if not math.isfinite(norm):
            return norm
        if norm > self.settings.clip:
            self.grad.mul_(self.settings.clip / (norm + 1e-6))
        for group, factor in zip(self._moments.optimiser.param_groups, self._lr_scales, strict=True):
            group["lr"] = rate * factor
        self._moments.optimiser.step()
        self.optimiser_step += 1
        self.write_back()
        if stepped is not None:
            self._read_back(
                stepped({place.name: view for place, (_, _, view) in zip(self.places, self._views, strict=True)})
            )
        self.grad.zero_()
        return norm

    def _read_back(self, names: Sequence[str]) -> None:
        changed = set(names)
        for place, (parameter, value, _) in zip(self.places, self._views, strict=True):
            if place.name in changed:
                value.copy_(parameter)

    @torch.no_grad()
    def write_back(self) -> None:
        """Rewrite the model's parameters from the master, in their own dtype."""
        for parameter, value, _ in self._views:
            parameter.copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the optimiser remembers, as plain CPU tensors."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._kept().items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put a `state()` back and rewrite the parameters; raise CheckpointError when it does not fit."""
        for name, own in self._kept().items():
            if name not in state or state[name].shape != own.shape or state[name].dtype != own.dtype:
                raise CheckpointError(f"the saved '{name}' does not fit this adapter", remedy="start a new run")
        for name, own in self._kept().items():
            own.copy_(state[name])
        self._moments.set_step(state["optimiser_step"])
        self.discard()
        self.write_back()

    @torch.no_grad()
    def set_values(self, master: torch.Tensor) -> None:
        """Put other values in the master and the parameters; moments stay."""
        if master.shape != self.master.shape:
            raise CheckpointError("the saved values do not fit this adapter", remedy="start a new run")
        self.master.copy_(master)
        self.write_back()

    def _kept(self) -> dict[str, torch.Tensor]:
        """All that the optimiser remembers, in place."""
        return {"master": self.master, "optimiser_step": self.optimiser_step, **self._moments.tensors}

    def _slices(self, wishes: Mapping[str, tuple[float, float]]) -> list[moments.Slice]:
        """Contiguous slices that share memory with the flat buffers, one per distinct wish."""
        slices = []
        for wish in sorted(set(wishes.values())):
            members = [place for place in self.places if wishes[place.name] == wish]
            whole = slice(members[0].start, members[-1].slice.stop)
            flat = torch.nn.Parameter(self.master[whole])
            flat.grad = self.grad[whole]
            slices.append(moments.Slice(flat, *wish))
        return slices


def _wish(name: str, groups: Mapping[str, Mapping[str, float]], settings: TrainSpec) -> tuple[float, float]:
    own = groups.get(name, {})
    return float(own.get("lr_scale", 1.0)), float(own.get("weight_decay", settings.weight_decay))
