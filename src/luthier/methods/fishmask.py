"""FishMask: the entries that the task's gradients are largest in learn, all others stay (Sung et al. 2111.09839)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from luthier import contracts
from luthier.errors import TrainingError

if TYPE_CHECKING:
    import torch


class Options(contracts.Options):
    """FishMask's settings."""

    share: float = Field(0.005, gt=0, le=0.5, description="of the matrices' entries that learn")
    samples: int = Field(64, ge=1, le=100_000, description="training rows from which the mask is chosen")
    linears: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="matrices inside the blocks that entries are chosen from, by pattern: '*.mlp.*'"
    )


class FishMask(contracts.Method):
    Options = Options
    fresh = "exact"
    learning_rate = 1e-3
    bracket = (5e-5, 5e-3)
    about = contracts.About(
        family="selective",
        title="FishMask: a fixed sparse mask chosen by the task's own gradients",
        trains="the entries with the largest Fisher information",
        formula="W' = W + m * d, m = top share of mean(grad^2), only d learns",
        source="Sung et al. 2021, arXiv 2111.09839",
        sites=("sparse_weights",),
        text=(
            "Before training, some rows are read once, backwards too, and every entry of the blocks' matrices gets "
            "the mean of its squared gradient, an estimate of its Fisher information: how much the answers depend on "
            "it. The half percent with the largest values learns, wherever it lies; the mask never changes. Kept are "
            "positions and differences, eight bytes an entry, and merged it costs nothing. Choosing the mask needs "
            "the gradients of all matrices once, one row at a time; training then remembers only the chosen entries."
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Choose the mask from the evidence's rows and free it; TrainingError without rows, but for shapes alone."""
        from luthier.adapt import delta
        from luthier.adapt.largest import largest

        model.requires_grad_(False)
        layers = delta.candidates(model, self.options.linears, "method.linears")
        total = sum(layer.weight.numel() for layer in layers.values())
        count = max(1, round(self.options.share * total))
        if model.device.type == "meta":
            return delta.attach_entries(model, _even(layers, self.options.share))
        if evidence is None:
            raise TrainingError(
                "FishMask chooses what to train by the gradients of training rows, and there are none",
                remedy="train it with `luthier train`, or attach it with evidence",
            )
        fisher = list(_fisher(layers, evidence, self.options.samples).values())
        chosen = largest(fisher.__getitem__, len(fisher), count)
        return delta.attach_entries(model, dict(zip(layers, chosen, strict=True)))

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put a saved sparse change on the model."""
        from luthier.adapt import delta

        return delta.load(model, folder)


def _even(layers: dict[str, Any], share: float) -> dict[str, torch.Tensor]:
    """The same share of every matrix, where only shapes are asked for."""
    import torch

    return {
        name: torch.empty(max(1, round(share * layer.weight.numel())), dtype=torch.int64, device="meta")
        for name, layer in layers.items()
    }


def _fisher(layers: dict[str, Any], evidence: contracts.Evidence, samples: int) -> dict[str, torch.Tensor]:
    """Sums of squared gradients (float32, in each matrix's shape) of the rows' log-likelihoods, row by row.

    A gradient is squared and dropped as soon as it is known, so only the sums are held. TrainingError without rows.
    """
    import torch

    sums = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    hooks = []
    try:
        for name, layer in layers.items():
            layer.weight.requires_grad_(True)
            hooks.append(layer.weight.register_post_accumulate_grad_hook(_square_into(sums[name])))
        rows = 0
        with torch.enable_grad():
            for loss in evidence.losses(samples):
                loss.sum.backward()
                rows += 1
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer.weight.requires_grad_(False)
            layer.weight.grad = None
    if not rows:
        raise TrainingError("FishMask found no training rows to choose its mask from")
    return sums


def _square_into(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def take(parameter: torch.Tensor) -> None:
        grad = parameter.grad
        if grad is not None:
            grad = grad.float()
            total.addcmul_(grad, grad)
            parameter.grad = None

    return take
