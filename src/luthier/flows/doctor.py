"""`luthier doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier import __version__, store
from luthier.errors import LuthierError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "gguf", "pyarrow")
EXTRAS = ("tensorboard", "wandb", "mlflow")  # each named like its package
ENVIRONMENT = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LUTHIER_CACHE", "OMP_NUM_THREADS")
LEAST_MEMORY, LEAST_DISK = 3 * 2**30, 3 * 2**30  # a 135M model: about 2 GiB while tuning, 1 GiB of files


@dataclass(frozen=True)
class Item:
    """One thing that was looked at; `ok` false means that something does not work as it stands."""

    name: str
    value: str
    ok: bool = True
    remedy: str = ""


def examine() -> list[dict[str, Any]]:
    """Look at versions, processor, memory, disk, cache and extras; the keys of a row are stable."""
    return [asdict(item) for look in (_versions, _processor, _room, _extras, _settings) for item in look()]


def _versions() -> Iterator[Item]:
    yield Item("luthier", __version__)
    ok = sys.version_info >= (3, 11)
    yield Item(
        "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", ok, "" if ok else "3.11+"
    )
    for name in PACKAGES:
        version = _version(name)
        yield Item(name, version or "not installed", bool(version), "" if version else "pip install luthier")


def _processor() -> Iterator[Item]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Item("cores", str(cores))
    if not importlib.util.find_spec("torch"):
        return
    import torch

    from luthier.model import load

    device = load.pick_device()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    yield Item("device", f"{device} ({name})")
    yield Item("threads", str(torch.get_num_threads()))
    fast = load.fast_bfloat16(device)
    yield Item("bfloat16", "in hardware: used" if fast else "not in hardware: float32 is used")


def _room() -> Iterator[Item]:
    import psutil

    memory = psutil.virtual_memory()
    enough = memory.available >= LEAST_MEMORY
    remedy = "" if enough else "close other programs, or lower train.tokens_per_pack"
    yield Item("memory", f"{_gib(memory.available)} of {_gib(memory.total)} GiB are free", enough, remedy)
    for name, folder in (("disk here", Path.cwd()), ("disk of the cache", store.cache_dir())):
        free = store.free_bytes(folder)
        yield Item(
            name, f"{_gib(free)} GiB are free", free >= LEAST_DISK, "" if free >= LEAST_DISK else "free some space"
        )
    yield Item("cache", str(store.cache_dir()), *_writable(store.cache_dir()))


def _writable(folder: Path) -> tuple[bool, str]:
    """Whether a file can be written below a folder, and what to do if not."""
    probe = folder / f"{store.STAGING}doctor"
    try:
        store.write_text(probe, "")
        probe.unlink()
    except (OSError, LuthierError):
        return False, "make it writable, or name another folder in LUTHIER_CACHE"
    return True, ""


def _extras() -> Iterator[Item]:
    for extra in EXTRAS:
        yield Item(f"extra {extra}", _version(extra) or f"absent (pip install 'luthier[{extra}]')")
    yield Item("bitsandbytes", _version("bitsandbytes") or "absent (pip install 'luthier[quantize]')")


def _settings() -> Iterator[Item]:
    for name in ENVIRONMENT:
        if value := os.environ.get(name):
            yield Item(name, value)
    yield Item("HF_TOKEN", "set" if os.environ.get("HF_TOKEN") else "not set (needed for gated models only)")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
