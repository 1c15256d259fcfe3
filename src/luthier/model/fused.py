"""LoRA layers of a training step as one function per input: fewer passes over (tokens, outputs) than autograd makes.

PEFT's forward makes three extra arrays of each layer's output size, and its backward two more; queries, keys and values
(and an MLP's gate and up) each read the same input again. Here layers that are given the same tensor run together: one
narrow product with all their A, updates added in place into the base layers' outputs, and one input gradient into which
every part is accumulated by the products themselves. Only the vanilla case in training is fused; everything else,
inference included, is PEFT's own forward, so an adapter answers with the same bits here and in plain PEFT.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn import functional as F

# Children of one module that get one input, by the names that families give them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Fused(torch.autograd.Function):
    """x (..., inputs) -> x W' + b + scale (x A') B' for each of several layers. The base's weights are frozen.

    After x and the scales come, for each layer, weight, bias, A and B.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: tuple[float, ...], *tensors: Any) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        weights, biases, narrows, wides = (tensors[place::4] for place in range(4))
        downs = narrows[0] if len(narrows) == 1 else torch.cat(narrows)  # (all ranks, inputs)
        narrow = rows @ downs.T  # (rows, all ranks)
        outs, parts = [], narrow.split([a.shape[0] for a in narrows], 1)
        for weight, bias, part, wide, scale in zip(weights, biases, parts, wides, scales, strict=True):
            out = F.linear(rows, weight, bias)
            out.addmm_(part, wide.T, alpha=scale)
            outs.append(out.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, narrow, downs, *weights, *wides)
        ctx.scales, ctx.ranks = scales, [a.shape[0] for a in narrows]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, narrow, downs, *rest = ctx.saved_tensors
        weights, wides = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        rows = x.reshape(-1, x.shape[-1])
        slopes = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        through = torch.cat([(s @ b).mul_(k) for s, b, k in zip(slopes, wides, ctx.scales, strict=True)], 1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = through @ downs
            for slope, weight in zip(slopes, weights, strict=True):
                grad_x.addmm_(slope, weight)
            grad_x = grad_x.view(x.shape)
        grad_downs = (through.T @ rows).split(ctx.ranks)
        parts = narrow.split(ctx.ranks, 1)
        found: list[torch.Tensor | None] = []
        for slope, part, scale, grad_a in zip(slopes, parts, ctx.scales, grad_downs, strict=True):
            found += [None, None, grad_a, (slope.T @ part).mul_(scale)]
        return grad_x, None, *found


class _Together:
    """Layers that get one input: whichever is called first computes for all, the others take what waits for them."""

    def __init__(self, modules: Sequence[LoraLinear]) -> None:
        self.modules = modules
        self._given: tuple[torch.Tensor, int] | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """This layer's output; None where one of the layers is not the vanilla case."""
        if self._given is not None and self._given[0] is x and self._given[1] == x._version and index in self._waiting:
            out = self._waiting.pop(index)
            if not self._waiting:
                self._given = None
            return out
        if not all(_vanilla(module, x) for module in self.modules):
            return None
        outs = run(self.modules, x)
        self._given = (x, x._version)
        self._waiting = {place: out for place, out in enumerate(outs) if place != index}
        return outs[index]


def run(modules: Sequence[LoraLinear], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run vanilla LoRA layers on one input (..., inputs); one output (..., outputs) of each."""
    tensors: list[Any] = []
    for module in modules:
        name, base = module.active_adapters[0], module.get_base_layer()
        tensors += [base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight]
    outs: tuple[torch.Tensor, ...] = _Fused.apply(x, tuple(m.scaling[m.active_adapters[0]] for m in modules), *tensors)
    return outs


def fuse(model: Any) -> None:
    """Let every plain LoRA layer train through the fused function; PEFT's own forward stays for all other cases."""
    together = _groups(model)
    for module in model.modules():
        if _plain(module):
            group, index = together.get(id(module), (None, 0))
            module.forward = functools.partial(_forward, module, module.forward, group, index)


def _groups(model: Any) -> dict[int, tuple[_Together, int]]:
    """The group and place of each layer that has siblings with the same input."""
    found: dict[int, tuple[_Together, int]] = {}
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in SIBLINGS:
            layers = [children[name] for name in names if name in children and _plain(children[name])]
            if len(layers) > 1:
                group = _Together(layers)
                found.update({id(layer): (group, place) for place, layer in enumerate(layers)})
    return found


def _plain(module: Any) -> bool:
    return type(module) is LoraLinear and type(module.get_base_layer()) is torch.nn.Linear


def _forward(
    module: LoraLinear, usual: Any, group: _Together | None, index: int, x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if module.training and torch.is_grad_enabled() and not args and not kwargs:
        out = group.take(index, x) if group else None
        if out is None and _vanilla(module, x):
            (out,) = run([module], x)
        if out is not None:
            return out
    result: torch.Tensor = usual(x, *args, **kwargs)
    return result


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
