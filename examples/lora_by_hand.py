"""LoRA by hand: the whole method in one small class, trained for a few steps, then merged.

    python examples/lora_by_hand.py

A frozen linear layer W keeps its weights; beside it run two thin matrices, B A, whose product is added to W's output
(Hu et al. 2106.09685). B starts at zero, so a fresh adapter changes nothing. After training, W + (alpha / rank) B A is
one plain matrix again: merging costs nothing at inference. luthier itself uses PEFT's implementation of the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from luthier.model import tiny


class LoraLinear(nn.Module):
    """W x + (alpha / rank) B A x, with W frozen. `x` (..., inputs) -> (..., outputs)."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(frozen.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.scale * (x @ self.A.T @ self.B.T)

    def merged(self) -> nn.Linear:
        """Fold the update into the weight and return the plain layer."""
        self.frozen.weight.data += self.scale * self.B.data @ self.A.data
        return self.frozen


def swap(model: nn.Module, make: type[LoraLinear] | None, **settings: float) -> None:
    """Wrap every linear layer inside the blocks, or unwrap them all (make=None)."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if make is not None and isinstance(child, nn.Linear) and name.endswith("_proj"):
                setattr(module, name, make(child, **settings))
            elif make is None and isinstance(child, LoraLinear):
                setattr(module, name, child.merged())


def main() -> dict[str, float]:
    """Teach a tiny random model one sentence; return the losses and the merge's error."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(tiny.write(Path(folder) / "tiny")).requires_grad_(False)
    ids = torch.randint(10, 200, (1, 24))
    before = model(input_ids=ids).logits
    swap(model, LoraLinear, rank=4, alpha=8)
    fresh = model(input_ids=ids).logits
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    attached = model(input_ids=ids).logits
    swap(model, None)
    merged = model(input_ids=ids).logits
    found = {
        "trainable": float(sum(p.numel() for p in learns)),
        "fresh_difference": float((fresh - before).detach().abs().max()),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "merge_difference": float((merged - attached).detach().abs().max()),
    }
    for name, value in found.items():
        print(f"{name:18} {value:.6g}")
    return found


if __name__ == "__main__":
    main()
