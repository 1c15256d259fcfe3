"""Learnt sparsity: every entry of a matrix has a difference and a gate that may close (Louizos et al. 1712.01312).

A gate is a hard concrete variable: a noisy sigmoid, stretched beyond 0 and 1 and clamped, so that it can be quite shut
and still has a gradient. The noise is drawn anew for each optimiser step from (seed, step) alone: all packs of a step,
activations that are computed again, every process and a resumed run see the same gates. When answers count (evaluation,
saving, after the last step) the gates are deterministic and only the largest differences remain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.adapt.delta import BYTES, DeltaAdapted, Matrix, added
from luthier.adapt.largest import largest

LOW, HIGH = -0.1, 1.1  # a gate is stretched to this range before it is clamped to [0, 1]
HEAT = 2 / 3  # of the noise
SHUT = HEAT * math.log(-LOW / HIGH)  # P(gate > 0) = sigmoid(gate's parameter - SHUT)
OPEN = 2.0  # where a gate's parameter starts: open, with its sigmoid still steep
CLOSING = 0.7  # share of the steps over which the allowed share falls to the target


@dataclass(frozen=True)
class Sparsity:
    """How many entries may remain, and how hard the others are pressed."""

    share: float  # of all entries
    pressure: float  # weight of the share that is too many, in the loss
    structured: bool  # a second gate for each matrix as a whole

    def allowed(self, done: float) -> float:
        """The share that is free of pressure after a share `done` of the steps: from all, cubically, to the target."""
        left = max(0.0, 1 - done / CLOSING)
        return self.share + (1 - self.share) * left**3


class Gated(Matrix):
    """A matrix with a difference and a gate for each entry, and perhaps a gate for the whole."""

    def __init__(self, name: str, module: Any, *, structured: bool) -> None:
        super().__init__(name, module)
        self.own = module.weight.data  # the base's tensor, which is never written
        self.changed = self.own.clone()  # what the layer holds while the adapter is on
        self.change = torch.nn.Parameter(torch.zeros_like(self.own, dtype=torch.float32))
        self.gates = torch.nn.Parameter(torch.full_like(self.change, OPEN))
        self.whole = torch.nn.Parameter(torch.full_like(self.change[0, :1], OPEN)) if structured else None
        self.noise: tuple[torch.Tensor, torch.Tensor] | None = None  # for the entries and the whole; None: settled
        self.kept: torch.Tensor | None = None  # positions that remain where the gates are settled

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        own = {f"{self.name}.change": self.change, f"{self.name}.gates": self.gates}
        return own if self.whole is None else {**own, f"{self.name}.whole": self.whole}

    def draw(self, seed: int) -> None:
        """Draw this step's noise, logistic, from `seed`; half precision is enough for noise."""
        generator = torch.Generator(self.own.device).manual_seed(seed)
        self.kept = None
        self.noise = tuple(  # type: ignore[assignment]
            torch.rand(shape, device=self.own.device, generator=generator).logit_(1e-6).bfloat16()
            for shape in (self.own.shape, (1,))
        )

    def gate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries' gates and their slopes in the gates' parameters."""
        return _gate(self.gates, None if self.noise is None else self.noise[0])

    def gate_of_all(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The whole matrix's gate and slope, (1,) each, where there is one."""
        return None if self.whole is None else _gate(self.whole, None if self.noise is None else self.noise[1])

    def difference(self) -> torch.Tensor:
        """Gates times changes, float32 in the matrix's shape."""
        gated = self.gate()[0].mul_(self.change)
        whole = self.gate_of_all()
        return gated if whole is None else gated.mul_(whole[0])

    def weight(self) -> torch.Tensor:
        return _Gate.apply(self.module.weight, self.change, self.gates, self.whole, self)  # type: ignore[no-any-return]

    def write(self) -> None:
        """Write base plus difference, or base plus its kept entries where the gates are settled."""
        self.module.weight.data = self.changed
        difference = self.difference()
        if self.kept is None:
            self.changed.copy_(added(self.own, difference))
            return
        flat = self.changed.copy_(self.own).view(-1)
        flat[self.kept] = added(flat[self.kept], difference.view(-1)[self.kept])

    def open_share(self) -> torch.Tensor:
        """The expected number of open gates, with autograd."""
        count = torch.sigmoid(self.gates - SHUT).sum()
        return count if self.whole is None else count * torch.sigmoid(self.whole - SHUT).sum()

    def restore(self) -> None:
        self.module.weight.data = self.own


def _gate(parameter: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    raw = parameter.detach()
    soft = torch.sigmoid(raw if noise is None else (raw + noise) / HEAT)
    stretched = soft * (HIGH - LOW) + LOW
    inside = (stretched > 0) & (stretched < 1)
    slope = soft.mul_(1 - soft).mul_((HIGH - LOW) / (1 if noise is None else HEAT)).mul_(inside)
    return stretched.clamp_(0, 1), slope


class _Gate(torch.autograd.Function):
    """The weight as it stands; its gradient goes to changes and gates. Gates are computed again, not remembered."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        change: torch.Tensor,
        gates: torch.Tensor,
        whole: torch.Tensor | None,
        matrix: Gated,
    ) -> torch.Tensor:
        ctx.matrix = matrix
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        matrix: Gated = ctx.matrix
        upstream = grads[0].float()
        if matrix.kept is not None:  # settled: the entries that were dropped learn nothing
            remaining = torch.zeros_like(upstream).view(-1)
            remaining[matrix.kept] = upstream.reshape(-1)[matrix.kept]
            upstream = remaining.view_as(upstream)
        gate, slope = matrix.gate()
        through = upstream * matrix.change  # what opening the gate further would change
        whole, of_all = matrix.gate_of_all(), None
        if whole is not None:
            of_all = ((through * gate).sum() * whole[1]).view(1)
            upstream, through = upstream * whole[0], through * whole[0]
        return None, upstream * gate, through.mul_(slope), of_all, None


class GatedAdapted(DeltaAdapted):
    """A base whose matrices learn differences and which of them to keep."""

    matrices: list[Gated]  # type: ignore[assignment]

    def __init__(self, model: Any, layers: Mapping[str, Any], sparsity: Sparsity, *, seed: int) -> None:
        matrices = [Gated(name, layer, structured=sparsity.structured) for name, layer in layers.items()]
        self.sparsity, self.seed = sparsity, seed
        self.entries = sum(matrix.own.numel() for matrix in matrices)
        self.remaining = max(1, int(sparsity.share * self.entries))
        self.done, self.total = 0, 0  # optimiser steps
        super().__init__(model, matrices)

    def saved_bytes(self) -> int:
        """A position and a value for each entry that may remain."""
        return BYTES * self.remaining

    def penalty(self) -> torch.Tensor:
        """The expected share of open gates beyond what is allowed at this step, times the pressure."""
        opened = torch.stack([matrix.open_share() for matrix in self.matrices]).sum() / self.entries
        allowed = self.sparsity.allowed(self.done / self.total if self.total else 0.0)
        return self.sparsity.pressure * torch.relu(opened - allowed)

    def stepped(self, done: int, total: int, gradients: Mapping[str, torch.Tensor]) -> Sequence[str]:
        """The next step gets other noise; after the last one the gates are settled for good."""
        self.done, self.total = done, total
        return ()

    def state(self) -> dict[str, torch.Tensor]:
        """How far the run has come: the noise follows from it."""
        return {"steps": torch.tensor([self.done, self.total])}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where the run stood."""
        self.done, self.total = (int(value) for value in state["steps"])

    @property
    def settled(self) -> bool:
        """Whether answers count: gates are deterministic and only the largest differences remain."""
        over = self.total > 0 and self.done >= self.total
        return over or not self.model.get_decoder().training

    def standing(self) -> object:
        """The weights depend on what was learnt, and on the step's noise or its absence."""
        return self.settled or self.done, super().standing()

    def write(self) -> None:
        """Draw or settle the gates and write the weights."""
        if self.settled:
            self._settle()
        else:
            for place, matrix in enumerate(self.matrices):
                matrix.draw(_mixed(self.seed, self.done, place))
        for matrix in self.matrices:
            matrix.write()

    @torch.no_grad()
    def sparse(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The largest differences under deterministic gates, as many as may remain."""
        self._written = None  # noise is drawn again when training goes on
        self._settle()
        found = {}
        for matrix in self.matrices:
            assert matrix.kept is not None, "settled"
            if len(matrix.kept):
                found[matrix.name] = matrix.kept, matrix.difference().view(-1)[matrix.kept]
        return found

    @torch.no_grad()
    def merge(self) -> Any:
        """Leave the base plus what is saved in the weights for good."""
        self._settle()
        for matrix in self.matrices:
            matrix.write()
        self._written = self.standing()
        return super().merge()

    def _settle(self) -> None:
        for matrix in self.matrices:
            matrix.noise = None
        chosen = largest(lambda place: self.matrices[place].difference(), len(self.matrices), self.remaining)
        for matrix, kept in zip(self.matrices, chosen, strict=True):
            matrix.kept = kept


def _mixed(seed: int, step: int, place: int) -> int:
    """One seed out of three numbers, well apart for neighbours (the multipliers of splitmix64)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
