"""Adapters whose layers PEFT swaps into the base: LoRA's family, (IA)^3, orthogonal ones and the rest of its shelf.

Prefix trees never pass through `PeftModel.forward`: `Adapted.model` is the inner transformers model with the adapter's
layers in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as set_state

from luthier import contracts, store
from luthier.adapt import folder as files
from luthier.adapt.folder import CONFIG, WEIGHTS
from luthier.errors import CheckpointError, Fault, TrainingError
from luthier.model.fused import fuse

# Keys of an adapter_config.json that may steer loading. Any other key must hold its default: some of them import
# code or open files (reliability section 4, "Config picks code").
ALLOWED = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "target_modules", "feedforward_modules", "exclude_modules", "bias", "use_rslora", "use_dora",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "init_ia3_weights", "layers_to_transform",
    "layers_pattern", "peft_version",
}  # fmt: skip
LARGEST_RANK = 1024


class PeftAdapted(contracts.Adapted):
    """A base with one PEFT adapter on it."""

    def __init__(self, wrapped: PeftModel) -> None:
        self.wrapped = wrapped
        self.model = wrapped.get_base_model()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that learn, by PEFT's name."""
        return {name: p for name, p in self.wrapped.named_parameters() if p.requires_grad}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the bare base."""
        with self.wrapped.disable_adapter():
            yield

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by the names of the file, float32 on the CPU."""
        state = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Write PEFT's two files. Saving asks no hub and pickles nothing."""
        config = self.wrapped.peft_config["default"]
        written = config.to_dict()
        written["inference_mode"] = True
        plain = {key: sorted(v) if isinstance(v, set) else v for key, v in written.items()}
        files.write(folder, plain, self.tensors())

    def merge(self) -> Any:
        """Fold the adapter into the base for good and return the plain model."""
        return self.wrapped.merge_and_unload(safe_merge=True)

    def detach(self) -> Any:
        """Take the adapter off and return the plain base, unchanged."""
        return self.wrapped.unload()


def attach(model: Any, config: PeftConfig, *, seed: int) -> PeftAdapted:
    """Put a fresh PEFT adapter on a model; first values are drawn from `seed` and nothing else.

    The adapter keeps the base's dtype: PEFT's float32 copies of every input would double a bf16 step's memory
    (performance section 3); the optimiser keeps the float32 master.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted = PeftAdapted(wrapped)  # type: ignore[arg-type]
    if not adapted.trainable():
        raise TrainingError("the method found nothing to train in this model")
    fuse(adapted.model)
    return adapted


def load(model: Any, folder: Path) -> PeftAdapted:
    """Put a saved adapter on a model; every tensor must be there, fit and be finite, or CheckpointError says which."""
    config = read_config(folder)
    config.inference_mode = False
    adapted = attach(model, config, seed=0)
    tensors = files.read_tensors(folder / WEIGHTS)
    files.require_fit(folder, tensors, {name: tuple(t.shape) for name, t in adapted.tensors().items()})
    set_state(adapted.wrapped, tensors)
    return adapted


def read_config(folder: Path) -> PeftConfig:
    """Rebuild a clean PEFT configuration from an untrusted folder; steering keys outside the list are refused."""
    written = dict(store.read_json(folder / CONFIG))
    kind = str(written.get("peft_type"))
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CheckpointError(f"unknown peft_type '{kind}'", where=str(folder / CONFIG))
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]
    default = cls().to_dict()
    known = {f.name for f in dataclasses.fields(cls)}
    faults = [
        Fault(key, f"is set to {value!r}, which luthier does not load")
        for key, value in written.items()
        if key not in ALLOWED and value not in (None, False, [], {}, default.get(key))
    ]
    if not isinstance(written.get("init_lora_weights", True), bool):
        written["init_lora_weights"] = True
    if isinstance(written.get("r"), int) and not 0 < written["r"] <= LARGEST_RANK:
        faults.append(Fault("r", f"is {written['r']}, it must lie between 1 and {LARGEST_RANK}"))
    if faults:
        raise CheckpointError("the adapter's configuration is refused", where=str(folder / CONFIG), faults=faults)
    return cls(**{k: v for k, v in written.items() if k in ALLOWED & known and k not in ("peft_type", "peft_version")})
