"""Learnt sparsity: every entry of a matrix has a difference and a gate that may close (Louizos et al. 1712.01312).

A gate is a hard concrete variable: a noisy sigmoid, stretched beyond 0 and 1 and clamped, so that it can be quite shut
and still has a gradient. The noise is drawn anew for each optimiser step from (seed, step) alone: all packs of a step,
activations that are computed again, every process and a resumed run see the same gates. When answers count (evaluation,
saving) the gates are deterministic and only the largest differences remain. After `SETTLING` of the steps these are
chosen for good and learn on alone, as in the paper: what is kept is then what was trained last.
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
SETTLING = 0.6  # share of the steps after which the mask is fixed
CLOSING = 0.5  # share of the steps over which the allowed share falls to the target


@dataclass(frozen=True)
class Sparsity:
    """How many entries may remain, and how hard the others are pressed."""

    share: float  # of all entries
    pressure: float  # weight of the share that is too many, in the loss

    def allowed(self, done: float) -> float:
        """The share that is free of pressure after a share `done` of the steps: from all, cubically, to the target."""
        left = max(0.0, 1 - done / CLOSING)
        return self.share + (1 - self.share) * left**3


class Gated(Matrix):
    """A matrix with a difference and a gate for each entry."""

    def __init__(self, name: str, module: Any) -> None:
        super().__init__(name, module)
        self.own = module.weight.data  # the base's tensor, which is never written
        self.changed = self.own.clone()  # what the layer holds while the adapter is on
        self.change = torch.nn.Parameter(torch.zeros_like(self.own, dtype=torch.float32))
        self.gates = torch.nn.Parameter(torch.full_like(self.change, OPEN))
        self.noise: torch.Tensor | None = None  # of this step; None where the gates are settled
        self.kept: torch.Tensor | None = None  # positions that remain where the gates are settled

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {f"{self.name}.change": self.change, f"{self.name}.gates": self.gates}

    def draw(self, seed: int) -> None:
        """Draw this step's noise, logistic, from `seed`; half precision is enough for noise."""
        generator = torch.Generator(self.own.device).manual_seed(seed)
        self.kept = None
        even = torch.rand(self.own.shape, device=self.own.device, generator=generator)
        self.noise = even.logit_(1e-6).bfloat16()

    def gate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gates and their slopes in the gates' parameters."""
        raw, heat = self.gates.detach(), 1.0 if self.noise is None else HEAT
        soft = torch.sigmoid(raw if self.noise is None else (raw + self.noise) / heat)
        stretched = soft * (HIGH - LOW) + LOW
        inside = (stretched > 0) & (stretched < 1)
        slope = soft.mul_(1 - soft).mul_((HIGH - LOW) / heat).mul_(inside)
        return stretched.clamp_(0, 1), slope

    def difference(self) -> torch.Tensor:
        """Gates times changes, float32 in the matrix's shape."""
        return self.gate()[0].mul_(self.change.detach())

    def weight(self) -> torch.Tensor:
        return _Gate.apply(self.module.weight, self.change, self.gates, self)  # type: ignore[no-any-return]

    def write(self) -> None:
        """Write base plus difference, or base plus its kept entries where the gates are settled."""
        self.module.weight.data = self.changed
        difference = self.difference()
        if self.kept is None:
            self.changed.copy_(added(self.own, difference))
            return
        flat = self.changed.copy_(self.own).view(-1)
        flat[self.kept] = added(flat[self.kept], difference.view(-1)[self.kept])

    def opened(self) -> torch.Tensor:
        """The expected number of open gates, with autograd."""
        return torch.sigmoid(self.gates - SHUT).sum()

    def restore(self) -> None:
        self.module.weight.data = self.own


class _Gate(torch.autograd.Function):
    """The weight as it stands; its gradient goes to changes and gates. Gates are computed again, not remembered."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        change: torch.Tensor,
        gates: torch.Tensor,
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
        return None, upstream * gate, upstream.mul(matrix.change).mul_(slope), None


class GatedAdapted(DeltaAdapted):
    """A base whose matrices learn differences and which of them to keep."""

    matrices: list[Gated]  # type: ignore[assignment]

    def __init__(self, model: Any, layers: Mapping[str, Any], sparsity: Sparsity, *, seed: int) -> None:
        matrices = [Gated(name, layer) for name, layer in layers.items()]
        self.sparsity, self.seed = sparsity, seed
        self.entries = sum(matrix.own.numel() for matrix in matrices)
        self.remaining = max(1, int(sparsity.share * self.entries))
        self.done, self.total = 0, 0  # optimiser steps
        self.fixed = False  # whether the entries that remain are chosen for good
        super().__init__(model, matrices)

    def saved_bytes(self) -> int:
        """A position and a value for each entry that may remain."""
        return BYTES * self.remaining

    def penalty(self) -> torch.Tensor | None:
        """The expected share of open gates beyond what is allowed at this step, times the pressure."""
        if self.fixed:
            return None
        opened = torch.stack([matrix.opened() for matrix in self.matrices]).sum() / self.entries
        allowed = self.sparsity.allowed(self.done / self.total if self.total else 0.0)
        return self.sparsity.pressure * torch.relu(opened - allowed)

    def stepped(self, done: int, total: int, gradients: Mapping[str, torch.Tensor]) -> Sequence[str]:
        """The next step gets other noise; late in the run the entries that remain are chosen for good."""
        self.done, self.total = done, total
        if not self.fixed and done >= SETTLING * total:
            self._settle()
            self.fixed = True
        return ()

    def state(self) -> dict[str, torch.Tensor]:
        """How far the run has come, from which the noise follows, and what was chosen: -1 where nothing is yet."""
        mask = torch.full((self.remaining,), -1)
        if self.fixed:
            parts = zip(self.matrices, self._starts(), strict=True)
            mask = torch.cat([matrix.kept.cpu() + start for matrix, start in parts if matrix.kept is not None])
        return {"steps": torch.tensor([self.done, self.total]), "mask": mask}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where the run stood."""
        self.done, self.total = (int(value) for value in state["steps"])
        self.fixed = bool((state["mask"] >= 0).all())
        self._written = None
        if self.fixed:
            for matrix, start in zip(self.matrices, self._starts(), strict=True):
                own = state["mask"] - start
                kept = own[(own >= 0) & (own < matrix.own.numel())]
                matrix.noise, matrix.kept = None, kept.to(matrix.own.device)

    @property
    def settled(self) -> bool:
        """Whether gates are deterministic and only the largest differences remain."""
        return self.fixed or not self.model.get_decoder().training

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
        if not self.settled:
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
        if self.fixed:
            return
        for matrix in self.matrices:
            matrix.noise = None
        chosen = largest(lambda place: self.matrices[place].difference(), len(self.matrices), self.remaining)
        for matrix, kept in zip(self.matrices, chosen, strict=True):
            matrix.kept = kept

    def _starts(self) -> list[int]:
        """Where each matrix begins when all are laid end to end."""
        sizes = [matrix.own.numel() for matrix in self.matrices]
        return [sum(sizes[:place]) for place in range(len(sizes))]


def _mixed(seed: int, step: int, place: int) -> int:
    """One seed out of three numbers, well apart for neighbours (the multipliers of splitmix64)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
