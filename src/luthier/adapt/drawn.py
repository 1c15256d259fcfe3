"""What a file leaves to be drawn again from a seed, and positions that it holds: neither is believed unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict

from luthier.adapt import folder as files
from luthier.adapt.folder import WEIGHTS
from luthier.errors import CheckpointError, Fault

# What some types draw from their seed instead of storing it: attributes of the tuner or of its layers.
DRAWN: Mapping[str, tuple[str, ...]] = {
    "VERA": ("vera_A", "vera_B"),
    "RANDLORA": ("randlora_A", "randlora_B"),
    "FOURIERFT": ("indices",),
    "WAVEFT": ("waveft_indices",),
    "UNILORA": ("unilora_indices_A", "unilora_indices_B"),
}
NOTE = "drawn_sha256"  # beside the tensors, in the file's metadata


def notes(wrapped: PeftModel) -> dict[str, str]:
    """What to write beside the tensors of an adapter."""
    found = fingerprint(wrapped)
    return {NOTE: found} if found else {}


def fingerprint(wrapped: PeftModel) -> str:
    """A hash of what the type drew from its seed and does not store, the same on float32 and bf16 bases; or ""."""
    config = wrapped.peft_config["default"]
    names = DRAWN.get(str(config.peft_type).rpartition(".")[2], ())
    if not names or getattr(config, "save_projection", False):
        return ""
    digest, seen = hashlib.sha256(), set()
    for module in wrapped.modules():
        for table in (getattr(module, name, None) for name in names):
            if not isinstance(table, dict | BufferDict) or "default" not in table or id(table["default"]) in seen:
                continue
            drawn = table["default"]
            seen.add(id(drawn))
            plain = drawn.detach().cpu()
            plain = plain.to(torch.bfloat16).view(torch.int16) if plain.is_floating_point() else plain.to(torch.int64)
            digest.update(plain.contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_same(folder: Path, wrapped: PeftModel) -> None:
    """Raise CheckpointError where this machine draws other values from the seed than the adapter learned beside."""
    written = files.read_notes(folder / WEIGHTS).get(NOTE)
    if written and written != fingerprint(wrapped):
        raise CheckpointError(
            "this machine draws other random parts from the seed than the adapter learned beside",
            where=str(folder / WEIGHTS),
            remedy="use the versions of torch and peft that it was trained with",
        )


def require_indices(
    folder: Path, wrapped: PeftModel, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Raise CheckpointError for positions outside a layer's matrix: torch would read beyond its memory."""
    found = []
    for name, own in expected.items():
        given = tensors[name]
        if given.is_floating_point() != own.is_floating_point():
            found.append(Fault(name, f"holds {given.dtype}, this adapter needs {own.dtype}"))
        elif not own.is_floating_point() and not torch.equal(given, own) and not _are_positions(wrapped, name, given):
            found.append(Fault(name, "holds positions outside its matrix"))
    if found:
        raise CheckpointError(f"{folder}: does not fit this base", faults=found[:20])


def _are_positions(wrapped: PeftModel, name: str, given: torch.Tensor) -> bool:
    """Whether integers are flat (n,) or (row, column) (2, n) positions in the matrix of the layer that owns them."""
    try:
        layer: Any = wrapped.get_submodule(name.rpartition(".")[0])
        shape = torch.tensor(layer.get_base_layer().weight.shape)
    except AttributeError:
        return False  # shared by layers: these must be the very ones that the configuration's seed gives
    ends = shape.prod() if given.dim() == 1 else shape[:, None]
    return (
        given.dim() in (1, 2)
        and len(given) in (len(shape), given.numel())
        and bool(((given >= 0) & (given < ends)).all())
    )
