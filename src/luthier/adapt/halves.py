"""PiSSA beside an untouched base (Meng et al. 2404.02948): W x + B A x - B0 A0 x, where A0, B0 never learn.

PiSSA starts at the leading singular directions of W and would put W - B0 A0 in the base's place. Here the base keeps W
and the difference is written as one LoRA of twice the rank: rows of A above those of A0, columns of B beside those of
-B0. So detaching is bit for bit, one base serves many adapters, and the file is a LoRA that plain PEFT loads.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn import functional as F

from luthier.adapt import wrapped
from luthier.errors import SpecError
from luthier.model.quantize import refuse_quantised

OVERSAMPLED = 8  # directions more than asked for, which make the fast SVD accurate


class Half(torch.nn.Module):
    """Stands where PEFT keeps a LoRA matrix; its weight is what learns, joined with where that began."""

    bias: None = None

    def __init__(self, start: torch.Tensor, dim: int, sign: float) -> None:
        """`start` (r, inputs) joined along 0, or (outputs, r) along 1; the part that never learns is sign * start."""
        super().__init__()
        self.learning = torch.nn.Parameter(start.clone())
        self.register_buffer("fixed", sign * start)
        self.dim = dim

    @property
    def weight(self) -> torch.Tensor:
        """Both halves, as a LoRA of rank 2 r has them."""
        return torch.cat([self.learning, self.fixed], dim=self.dim)  # type: ignore[list-item]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply both halves to x (..., width)."""
        return F.linear(x, self.weight)


class Pissa(wrapped.PeftAdapted):
    """A base with PiSSA on it. Only the learning halves are trainable; the file holds whole matrices."""

    def kept(self) -> dict[str, torch.Tensor]:
        """LoRA matrices of rank 2 r, under PEFT's names."""
        found = {}
        for name, module in self.wrapped.named_modules():
            if isinstance(module, Half):
                found[f"{name.removesuffix('.default')}.weight"] = module.weight
        return found


def attach(model: Any, *, rank: int, target_modules: Any, iterations: int | None, seed: int) -> Pissa:
    """Put a fresh PiSSA of that rank on the model; the SVD's random start is drawn from `seed`.

    `iterations` of the fast SVD, or None for the exact one. SpecError on a quantised base, and where a layer is
    narrower than the rank.
    """
    refuse_quantised(model, "PiSSA's SVD")
    settings = {"r": 2 * rank, "lora_alpha": 2 * rank, "target_modules": target_modules}

    def made(peft: PeftModel) -> Pissa:
        for name, module in list(peft.named_modules()):
            if isinstance(module, LoraLinear):
                _start(name, module, rank, iterations)
        return Pissa(peft)

    config = wrapped.configure("LORA", **settings)
    adapted = wrapped.attach(model, config, seed=seed, made=made)
    assert isinstance(adapted, Pissa)
    return adapted


def _start(name: str, layer: LoraLinear, rank: int, iterations: int | None) -> None:
    base: Any = layer.get_base_layer()
    weight: torch.Tensor = base.weight
    if type(base) is not torch.nn.Linear or not weight.is_floating_point():
        raise SpecError(f"{name} is no plain matrix to take an SVD of", where="method", remedy="use the method `lora`")
    if rank > min(weight.shape):
        what = f"{name} has only {min(weight.shape)} singular directions"
        raise SpecError(what, where="method.rank", remedy="lower the rank")
    a, b = leading(weight.detach(), rank, iterations)
    layer.lora_A["default"] = Half(a, 0, 1.0)
    layer.lora_B["default"] = Half(b, 1, -1.0)


def leading(weight: torch.Tensor, rank: int, iterations: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 (rank, inputs) and B0 (outputs, rank) whose product is the best approximation of `weight`, in its dtype."""
    if weight.device.type == "meta":
        return weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
    plain = weight.float()
    if iterations is None:
        u, s, vh = torch.linalg.svd(plain, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(plain, q=min(rank + OVERSAMPLED, *plain.shape), niter=iterations)
        vh = v.T
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)
