"""The LoRA linear of a training step as one function: fewer passes over (tokens, outputs) than autograd makes.

PEFT's forward makes three extra arrays of the layer's output size, and its backward two more. Here the update is added
in place into the base layer's output, and the update's input gradient into the base's. Only the vanilla case in
training is fused; everything else, inference included, is PEFT's own forward, so an adapter answers with the same bits
here and in plain PEFT.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn import functional as F


class _Fused(torch.autograd.Function):
    """x (..., inputs) -> x W' + b + scale (x A') B'. The base's weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        narrow = rows @ a.T  # (rows, rank)
        out = F.linear(rows, weight, bias)
        out.addmm_(narrow, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, narrow)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, narrow = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        through = (grad @ b).mul_(ctx.scale)  # (rows, rank)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(through, a)
            grad_x = grad_x.view(x.shape)
        grad_b = (grad.T @ narrow).mul_(ctx.scale)
        return grad_x, None, None, through.T @ rows, grad_b, None


def fuse(model: Any) -> None:
    """Let every plain LoRA layer train through the fused function; PEFT's own forward stays for all other cases."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is torch.nn.Linear:
            module.forward = functools.partial(_forward, module, module.forward)  # type: ignore[method-assign]


def _forward(module: LoraLinear, usual: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not (module.training and torch.is_grad_enabled()) or args or kwargs or not _vanilla(module, x):
        result: torch.Tensor = usual(x, *args, **kwargs)
        return result
    name, base = module.active_adapters[0], module.get_base_layer()
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    fused: torch.Tensor = _Fused.apply(x, base.weight, base.bias, a, b, module.scaling[name])
    return fused


def _vanilla(module: LoraLinear, x: torch.Tensor) -> bool:
    """One active adapter of the input's dtype, without dropout, bias or a variant, over a frozen weight."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return False
    name = module.active_adapters[0]
    return (
        name in module.lora_A
        and name not in module.lora_variant
        and isinstance(module.lora_dropout[name], torch.nn.Identity)
        and module.lora_B[name].bias is None
        and module.lora_A[name].weight.dtype == x.dtype
        and not module.get_base_layer().weight.requires_grad
    )
