"""What a model folder's content is called: SHA-256 of its files, each computed once per size and time of change."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier import store
from luthier.errors import LuthierError, ModelError

CONFIG, WEIGHTS = "config.json", "*.safetensors"
# Keys of config.json that tell who wrote it and when, not what the model computes.
INCIDENTAL = {"transformers_version", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype"}


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file. It is remembered in the cache folder, and computed anew when the file has changed."""
    path = path.resolve()
    seen = path.stat()
    stamp = {"path": str(path), "size": seen.st_size, "changed": seen.st_mtime_ns}
    note = store.cache_dir() / "digests" / f"{store.content_hash(stamp, 32)}.json"
    with suppress(LuthierError, OSError, TypeError, KeyError):
        return str(store.read_json(note)["sha256"])
    digest = store.sha256_file(path)
    with suppress(LuthierError, OSError):  # a cache that cannot be written costs time, nothing else
        store.write_json(note, {**stamp, "sha256": digest})
    return digest


def base_hash(folder: Path) -> str:
    """Short hash of the weights and of what the config says about the computation; equal for equal models."""
    config: dict[str, Any] = store.read_json(folder / CONFIG)
    weights = {path.name: file_digest(path) for path in sorted(folder.glob(WEIGHTS))}
    if not weights:
        raise ModelError("holds no *.safetensors", where=str(folder), remedy="give a folder with safetensors weights")
    return store.content_hash([{k: v for k, v in config.items() if k not in INCIDENTAL}, weights])
