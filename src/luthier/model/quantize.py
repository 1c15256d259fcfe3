"""A frozen base in 4 or 8 bits through bitsandbytes, and what that means for everything built on it.

Only matrices inside the blocks are quantised; embeddings, norms, biases and the (often tied) head keep their dtype. Two
things differ from a plain `BitsAndBytesConfig`, so that a base computes the same whether it learns or answers, and a
row's answer never depends on its neighbours in a pack:

- int8 is weight-only: the product is taken with the dequantised matrix. transformers' LLM.int8 quantises activations
  too when it answers, and picks outlier columns over the whole batch.
- the repacked 4-bit product of bitsandbytes on AVX512-BF16 processors is off. It is switched on by the first answer,
  has no gradient, and training would lose what flows through the base's matrices.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from luthier.errors import ModelError, SpecError
from luthier.spec import QuantizeSpec

FOUR_BIT, EIGHT_BIT = "Params4bit", "Int8Params"  # what bitsandbytes calls its parameters
NESTED = 256  # 4-bit constants that share one constant of their own
LARGEST_INT8 = 127.0
DEVICES = ("cpu", "cuda")
MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer")
# PEFT's types whose layers take the base's own product: on a quantised base they equal the same adapter on the
# dequantised one (tests). Others read the packed weights as if they were numbers, which fails late or, with int8 and
# square matrices, not at all.
PEFT_TYPES = {
    "ADALORA", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LN_TUNING", "LORA",
    "MISS", "OFT", "RANDLORA", "ROAD", "VBLORA", "VERA",
}  # fmt: skip


@dataclass(frozen=True)
class Bits:
    """What is really kept, per parameter. Look-up tables, a kilobyte a matrix at most, count for the whole."""

    matrices: float  # bits per parameter of the quantised matrices: packed weights and their constants
    whole: float  # bits per parameter of the whole model
    quantised: int  # parameters in quantised matrices
    parameters: int  # parameters of the whole model
    bytes: int  # of the whole model


def require(asked: QuantizeSpec, device: str) -> None:
    """Refuse, before anything is loaded, what cannot be quantised here; SpecError says why and what to do."""
    if asked.name == "none":
        return
    kind = device.partition(":")[0]
    if kind not in DEVICES:
        what, remedy = f"is not proven on {kind}", "model.device=cpu, or no quantize"
        raise SpecError(f"quantize: {asked.name} {what}", where="quantize", remedy=remedy)
    if not importlib.util.find_spec("bitsandbytes"):
        remedy = "pip install 'luthier[quantize]'"
        raise SpecError(f"quantize: {asked.name} needs bitsandbytes", where="quantize", remedy=remedy)


def settings(asked: QuantizeSpec, dtype: torch.dtype) -> Any:
    """The BitsAndBytesConfig with which transformers quantises matrix by matrix while it loads."""
    from transformers import BitsAndBytesConfig

    if asked.name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=asked.name,
        bnb_4bit_use_double_quant=asked.double,
        bnb_4bit_compute_dtype=_compute(asked, dtype),
    )


def while_loading(asked: QuantizeSpec | None) -> bool:
    """Whether transformers can quantise this while it loads; it knows no block but 64."""
    return asked is not None and asked.name != "none" and asked.block == 64


@torch.no_grad()
def quantise(model: Any, asked: QuantizeSpec) -> Any:
    """Quantise the matrices of a loaded network in place, all but its head; return it ready for use.

    For blocks that transformers does not offer, and for networks that come from no folder. ModelError where no matrix
    is found.
    """
    from bitsandbytes import nn as layers_of

    bnb: Any = layers_of
    head, compute = model.get_output_embeddings(), _compute(asked, model.dtype)
    linears = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head}
    if not linears:
        raise ModelError("has no matrix that could be quantised", remedy="load it without `quantize`")
    for name, linear in linears.items():
        weight, shape = linear.weight.data, (linear.in_features, linear.out_features, linear.bias is not None)
        made: Any
        if asked.name == "int8":
            made = bnb.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
            made.weight = bnb.Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
        else:
            made = bnb.Linear4bit(*shape, compute, asked.double, asked.name, device="meta")
            made.weight = bnb.Params4bit(
                weight, requires_grad=False, blocksize=asked.block, compress_statistics=asked.double,
                quant_type=asked.name, module=made,
            ).to(weight.device)  # fmt: skip
        made.bias, made.source_cls = linear.bias, type(linear)
        model.set_submodule(name, made.train(linear.training))
    setattr(model, "is_loaded_in_8bit" if asked.name == "int8" else "is_loaded_in_4bit", True)  # PEFT asks for it
    return steady(model)


def steady(model: Any) -> Any:
    """Let every quantised matrix compute the same in training and in use (see the module's text); return the model."""
    for module in layers(model).values():
        if type(module.weight).__name__ == FOUR_BIT:
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = module.compute_dtype or model.dtype
            module.compute_type_is_set = True
        else:
            module.forward = functools.partial(_int8_forward, module)
    return model


def layers(model: Any) -> dict[str, Any]:
    """The linear layers whose matrix is quantised, by name; empty for a plain model."""
    return {name: module for name, module in model.named_modules() if _is_quantised(module)}


def found(model: Any) -> dict[str, Any]:
    """How a model's matrices are kept, as `quantize` would ask for it, read off the matrices; empty for a plain one."""
    module = next(iter(layers(model).values()), None)
    if module is None:
        return {}
    if type(module.weight).__name__ == EIGHT_BIT:
        return QuantizeSpec(name="int8").model_dump()
    state = module.weight.quant_state
    compute = "auto" if module.compute_dtype == model.dtype else str(module.compute_dtype).removeprefix("torch.")
    return QuantizeSpec(name=state.quant_type, double=state.nested, block=state.blocksize, compute=compute).model_dump()  # type: ignore[arg-type]


def bits(model: Any) -> Bits:
    """Count the bytes that are really kept; ModelError for a model without a quantised matrix."""
    matrices = list(layers(model).values())
    if not matrices:
        raise ModelError("no matrix of this model is quantised", remedy="load it with `quantize: nf4`")
    weights = {id(module.weight) for module in matrices}
    plain = [p for p in model.parameters() if id(p) not in weights]
    quantised = sum(_count(module) for module in matrices)
    kept = sum(tensor.nbytes for module in matrices for tensor in _constants(module))
    tables = {tensor.data_ptr(): tensor.nbytes for module in matrices for tensor in _tables(module)}
    parameters = quantised + sum(p.numel() for p in plain)
    size = kept + sum(tables.values()) + sum(p.nbytes for p in plain)
    return Bits(8 * kept / quantised, 8 * size / parameters, quantised, parameters, size)


def parameters(model: Any) -> int:
    """How many numbers a model has, packed or not."""
    packed = {id(module.weight): _count(module) for module in layers(model).values()}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


@torch.no_grad()
def dequantised(model: Any) -> Any:
    """Turn every quantised matrix of a base into a plain one of the same values, in place; return the plain model."""
    from transformers.pytorch_utils import Conv1D

    for name, module in layers(model).items():
        weight = weight_of(module, model.dtype)
        transposed = issubclass(getattr(module, "source_cls", torch.nn.Linear), Conv1D)
        with torch.device("meta"):
            made: Any = (
                Conv1D(module.out_features, module.in_features)
                if transposed
                else torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            )
        made.weight = torch.nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
        made.bias = module.bias
        model.set_submodule(name, made.train(module.training))
    for mark in MARKS:
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def weight_of(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (outputs, inputs) that a quantised layer multiplies by."""
    if type(module.weight).__name__ == EIGHT_BIT:
        return _dequantised_int8(module.weight.data, _scales(module), dtype)
    from bitsandbytes.functional import dequantize_4bit

    plain: torch.Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return plain.to(dtype)


def refuse_quantised(model: Any, what: str, remedy: str = "") -> None:
    """Raise SpecError where a model has quantised matrices and `what` needs plain ones."""
    if any(True for _ in _quantised(model)):
        kind = found(model)["name"]
        raise SpecError(
            f"{what} needs plain matrices, and this base's are quantised ({kind})",
            where="quantize",
            remedy=remedy or "quantize: none, or method: lora, which leaves the base's matrices as they are",
        )


def require_tolerated(model: Any, peft_type: str | None) -> None:
    """Raise SpecError where a base is quantised and PEFT's layers of this type would not compute with its product."""
    kind = str(peft_type).rpartition(".")[2]
    if kind not in PEFT_TYPES:
        refuse_quantised(model, f"PEFT's {kind}")


@contextmanager
def unmarked(model: Any) -> Iterator[None]:
    """Inside, the model does not say that it is quantised, for code that refuses by the mark alone."""
    marks = {mark: vars(model).pop(mark) for mark in MARKS if mark in vars(model)}
    try:
        yield
    finally:
        vars(model).update(marks)


class _Int8Product(torch.autograd.Function):
    """x (..., inputs) -> x W' + b with W dequantised where it is needed: no plain matrix outlives the call."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scales)
        return F.linear(x, _dequantised_int8(packed, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        grad = grads[0]
        grad_x = grad @ _dequantised_int8(packed, scales, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias


def _int8_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _Int8Product.apply(x, module.weight.data, _scales(module), module.bias)
    return product


def _dequantised_int8(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (packed.float() * (scales / LARGEST_INT8)[:, None]).to(dtype)


def _scales(module: Any) -> torch.Tensor:
    """The largest absolute value of each row (outputs,): bitsandbytes moves it from the weight to the layer's state."""
    scales: torch.Tensor = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return scales


def _compute(asked: QuantizeSpec, dtype: torch.dtype) -> torch.dtype:
    chosen: torch.dtype = dtype if asked.compute == "auto" else getattr(torch, asked.compute)
    return chosen


def _is_quantised(module: Any) -> bool:
    return type(getattr(module, "weight", None)).__name__ in (FOUR_BIT, EIGHT_BIT) and not hasattr(module, "base_layer")


def _quantised(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if _is_quantised(module))


def _count(module: Any) -> int:
    return int(module.in_features * module.out_features)


def _constants(module: Any) -> list[torch.Tensor]:
    """All that one matrix keeps for itself."""
    if type(module.weight).__name__ == EIGHT_BIT:
        return [module.weight.data, _scales(module)]
    state = module.weight.quant_state
    own = [module.weight.data, state.absmax]
    return [*own, state.state2.absmax, state.offset] if state.nested else own


def _tables(module: Any) -> list[torch.Tensor]:
    """Look-up tables: the sixteen 4-bit values, and the 256 of the constants' own format."""
    if type(module.weight).__name__ == EIGHT_BIT:
        return []
    state = module.weight.quant_state
    return [state.code, state.state2.code] if state.nested else [state.code]
