"""An adapter's folder in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, read with distrust.

Methods that PEFT lacks use the same two files with a `peft_type` of their own, LUTHIER_<ENGINE>. PEFT's registry takes
only names of its own enum, and filling it would need torch at `import luthier`; so plain PEFT refuses such a folder
with a KeyError that names luthier, and luthier reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from luthier import store
from luthier.errors import CheckpointError, Fault

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN = "LUTHIER_"  # what the peft_type of our own engines begins with


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str] | None = None
) -> None:
    """Write both files into an existing folder; tensors keep their dtype and go to the CPU; notes are metadata."""
    store.write_json(folder / CONFIG, dict(config))
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt", **(notes or {})})
    if notes:
        _sort_notes(folder / WEIGHTS)


def _sort_notes(path: Path) -> None:
    """Sort a file's metadata: safetensors writes it in the order of a hash table, another one in every process."""
    with path.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same header in another order"
        opened.seek(8)
        opened.write(text.ljust(length))


def own_config(engine: str, model: Any, **settings: Any) -> dict[str, Any]:
    """The configuration of an engine that PEFT lacks, with the keys that PEFT's tools look for."""
    return {
        "peft_type": OWN + engine,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path or None,
        "inference_mode": True,
        **settings,
    }


def read_own_config(folder: Path, engine: str, known: set[str]) -> dict[str, Any]:
    """Read an own engine's configuration; CheckpointError for another type or keys that the engine does not know."""
    written = dict(store.read_json(folder / CONFIG))
    kind = written.pop("peft_type", None)
    if kind != OWN + engine:
        raise CheckpointError(f"is an adapter of type {kind!r}, not {OWN + engine}", where=str(folder / CONFIG))
    extra = sorted(written.keys() - known - {"task_type", "base_model_name_or_path", "inference_mode"})
    if extra:
        faults = [Fault(key, "is not a setting of this adapter") for key in extra]
        raise CheckpointError("the adapter's configuration is refused", where=str(folder / CONFIG), faults=faults)
    return written


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; pickles and damaged files are named, not parsed."""
    try:
        with safe_open(path, framework="pt"):
            pass
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError("is missing", where=str(path)) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"is not a readable safetensors file ({error})", where=str(path)) from error


def read_notes(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_tensors` could read."""
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata() or {})


def require_fit(folder: Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless names and shapes are the expected ones and every value is finite."""
    faults = [Fault(name, "is not in the file") for name in sorted(expected.keys() - tensors.keys())]
    faults += [Fault(name, "is not part of this adapter") for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        if tuple(tensors[name].shape) != tuple(expected[name]):
            faults.append(Fault(name, f"has shape {tuple(tensors[name].shape)}, this base needs {expected[name]}"))
        elif tensors[name].is_floating_point() and not torch.isfinite(tensors[name]).all():
            faults.append(Fault(name, "holds values that are not finite"))
    if faults:
        raise CheckpointError(f"{folder}: does not fit this base ({len(faults)} faults)", faults=faults[:20])
