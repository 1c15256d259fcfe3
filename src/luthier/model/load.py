"""A model folder becomes a frozen network in memory. Only safetensors are read, and no weight is left at random."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import registry, store
from luthier.errors import ModelError, SpecError, UsageError
from luthier.model.catalog import require_whole
from luthier.model.digest import CONFIG
from luthier.model.quiet import quiet
from luthier.spec import QuantizeSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("bfloat16", "float32", "float16")


def load_model(
    folder: Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False,
    quantize: QuantizeSpec | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Load a causal language model for inference: evaluation mode, nothing trainable, on one device.

    With `quantize` its matrices are kept in 4 or 8 bits; a folder that is quantised already stays as it is. Raise
    ModelError for a folder that is not whole, pickled weights, an unknown architecture, damaged or missing weights, or
    too little memory, SpecError for a quantisation that cannot be had here; each says what to do.
    """
    from luthier.model import quantize as quantisation

    config = _read_config(require_whole(folder), trust_remote_code)
    place = pick_device(device)
    asked = _asked(quantize, config, folder, place)
    kind = pick_dtype(dtype, place)
    more: dict[str, Any] = {}
    if asked and quantisation.while_loading(asked):
        more = {"quantization_config": quantisation.settings(asked, kind), "device_map": {"": place}}
    elif "quantization_config" in config:
        more = {"device_map": {"": place}}
    model: Any = _from_pretrained(folder, config, kind, trust_remote_code, **more)
    try:
        if not more:
            model.to(place)
        if asked and not more:
            quantisation.quantise(model, asked)
    except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
        raise ModelError(f"does not fit on {place} ({_first_line(error)})", where=str(folder)) from error
    loaded: PreTrainedModel = quantisation.steady(model).eval().requires_grad_(False)
    return loaded


def _asked(quantize: QuantizeSpec | None, config: dict[str, Any], folder: Path, place: str) -> QuantizeSpec | None:
    """The quantisation to carry out, once it is known to be possible here; None for a plain load."""
    from luthier.model import quantize as quantisation

    if quantize is None or quantize.name == "none":
        return None
    if "quantization_config" in config:
        raise SpecError(
            "is quantised already", where=str(folder), remedy="leave `quantize` out, or take the plain model"
        )
    quantisation.require(quantize, place)
    return quantize


def pick_device(name: str = "auto") -> str:
    """The device to use: the one asked for, or the first there is of cuda, mps, cpu. ModelError when it is absent."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, present in there.items() if present)
    kind, _, index = name.partition(":")
    if kind not in there or (index and not index.isdigit()):
        raise UsageError(f"'{name}' is not a device", remedy=registry.suggestion(name, ["auto", *there]))
    if not there[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"this machine has no {name}", remedy=f"use device: auto (here: {pick_device()})")
    return name


def pick_dtype(name: str = "auto", device: str = "cpu") -> torch.dtype:
    """The number format to compute in; `auto` is bfloat16 where the device has it in hardware, else float32."""
    import torch

    if name == "auto":
        name = "bfloat16" if fast_bfloat16(device) else "float32"
    if name not in DTYPES:
        raise UsageError(f"'{name}' is not a dtype to compute in", remedy=registry.suggestion(name, ["auto", *DTYPES]))
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def fast_bfloat16(device: str) -> bool:
    """Does this device multiply bfloat16 in hardware? On CPUs without it, it is emulated and slower than float32."""
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device != "cpu":
        return False
    able: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return any(able.get(feature) for feature in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The facts that a report shows about a loaded model."""
    from luthier.model import quantize

    config = model.config.get_text_config()
    return {
        "architecture": type(model).__name__,
        "parameters": quantize.parameters(model),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "context": getattr(config, "max_position_embeddings", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "quantize": quantize.found(model) or None,
    }


def _read_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The folder's config, when it names an architecture that can be loaded here."""
    from transformers import CONFIG_MAPPING, __version__

    config = store.read_json(folder / CONFIG)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ModelError("names no `model_type`", where=str(folder / CONFIG), remedy="is this a transformers model?")
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        own = "`model.trust_remote_code: true` runs the code that comes with it, if you trust its authors; or "
        raise ModelError(
            f"the architecture '{kind}' is not known to transformers {__version__}",
            where=str(folder),
            remedy=f"{own if 'auto_map' in config else ''}a newer transformers may know it",
        )
    return dict(config)


def _from_pretrained(folder: Path, config: dict[str, Any], dtype: torch.dtype, trust: bool, **more: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained  # with loading info it returns a pair, which its type does not say
    kind, where = config["model_type"], str(folder)
    try:
        with quiet():
            model, told = read(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust,
                output_loading_info=True,
                **more,
            )
    except SafetensorError as error:
        remedy = "copy the folder again, or pull it anew"
        raise ModelError(f"has damaged weights ({error})", where=where, remedy=remedy) from error
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        what = f"the architecture '{kind}' cannot be loaded as a causal language model ({_first_line(error)})"
        raise ModelError(what, where=where, remedy="choose a decoder such as those of `luthier models list`") from error
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        what = f"lacks {len(missing)} of its weights, such as {missing[0]}; they would be random"
        raise ModelError(what, where=where, remedy="copy the whole folder, with every safetensors file")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
