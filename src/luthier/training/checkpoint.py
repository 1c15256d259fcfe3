"""Checkpoints that are whole or not there, and say so (reliability section 2).

Each is a folder `step-0000120` of `tensors.safetensors` and `state.json` under a manifest with the digests of both.
Nothing in it is ever unpickled. The newest good one is used; damaged ones are set aside and named.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import luthier
from luthier import store
from luthier.errors import CheckpointError, Fault, StorageError, UsageError
from luthier.spec import RunSpec

TENSORS, STATE = "tensors.safetensors", "state.json"
NAME = re.compile(r"^step-(\d{7,})$")
FORMAT = 1
ROOM_TO_START = 2.0  # checkpoints' worth of free space before the first step
ROOM_TO_SAVE = 2.2  # and before each save: the new one, while the old ones still stand
# Settings that cannot change what is learned, or that the hashes of data and base speak for.
FREE_OF_CHOICE = {
    "runs", "name", "evaluate", "model.name", "model.revision", "model.device", "data.train", "data.dev", "data.test",
    "train.save_every", "train.keep", "train.report_to", "train.threads", "train.tokens_per_pack",
    "train.processes", "train.sharding",
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint as read back."""

    step: int
    folder: Path
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]
    warnings: tuple[str, ...] = ()  # the resume is correct, but not bit for bit


@dataclass(frozen=True)
class Found:
    """What `latest` came upon: the newest good checkpoint, if any, and what was wrong with newer ones."""

    snapshot: Snapshot | None
    damaged: tuple[Fault, ...] = ()


def fingerprint(
    spec: RunSpec, *, data_hash: str, base_hash: str, device: torch.device | str, dtype: torch.dtype | str
) -> dict[str, Any]:
    """What a resumed run must share with the killed one: `task` for the same result, `machine` for the same bits.

    Settings that cannot change what is learned are left out, so they may differ. Files are known by `data_hash`.
    """
    settings = _flat(spec.model_dump(mode="json"))
    task = {key: value for key, value in settings.items() if not _is_free(key)}
    machine = {
        "luthier": luthier.__version__,
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_per_pack": spec.train.tokens_per_pack,
    }
    return {"task": {**task, "data": data_hash, "base": base_hash}, "machine": machine}


class Checkpoints:
    """The checkpoints of one run. Hold the run's lock, or use `opened`, so that no second process writes here."""

    def __init__(self, folder: Path, *, keep: int = 2, fingerprint: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.keep = max(2, keep)
        self.fingerprint = json.loads(json.dumps(fingerprint or {}))  # as it will look when read back

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first (not verified)."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m.group(1)) for path in self.folder.iterdir() if (m := NAME.match(path.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def preflight(self, size: int) -> None:
        """Refuse to start a run whose checkpoints of `size` bytes will not fit on the disk."""
        self._room(ROOM_TO_START * size)

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, pin: int | None = None
    ) -> Path:
        """Publish one checkpoint, then drop old ones; `pin` is a step (the best so far) that must outlive rotation.

        Raises StorageError with the earlier checkpoints untouched when the disk is full or read-only.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(
            {"step": step, "pin": pin, "fingerprint": self.fingerprint, "state": dict(state)}, allow_nan=False
        )
        self._room(ROOM_TO_SAVE * (sum(t.nbytes for t in tensors.values()) + len(text)))

        def fill(staging: Path) -> None:
            safetensors.torch.save_file(tensors, str(staging / TENSORS))
            (staging / STATE).write_text(text, "utf-8")

        final = self.path(step)
        with _plain_storage_errors(final):
            store.publish_folder(final, fill, about={"step": step, "pin": pin})
        self._rotate()
        return final

    def latest(self) -> Found:
        """Return the newest checkpoint whose every byte is as written; set damaged ones aside as `.bad-*`.

        Raises CheckpointError when it belongs to another task, base or data.
        """
        store.sweep_staging(self.folder)
        damaged: list[Fault] = []
        for step in reversed(self.steps()):
            faults = self._faults(step)
            if not faults:
                return Found(self._read(step), tuple(damaged))
            damaged += faults
            folder = self.path(step)
            folder.rename(self.folder / f".bad-{folder.name}-{secrets.token_hex(4)}")
        return Found(None, tuple(damaged))

    def read(self, step: int) -> Snapshot:
        """Read one checkpoint by its step; raise CheckpointError when it is missing or damaged."""
        faults = self._faults(step)
        if faults:
            raise CheckpointError(f"the checkpoint of step {step} cannot be used", faults=faults)
        return self._read(step)

    def clear(self) -> None:
        """Remove all checkpoints: a new run begins."""
        store.sweep_staging(self.folder)
        for step in self.steps():
            _remove(self.path(step))

    def refuse_others(self) -> None:
        """Raise UsageError when a run that is not resumed would mix with an earlier one's checkpoints."""
        if self.steps():
            remedy = "go on with --resume, or give the run another `name`"
            raise UsageError("holds the checkpoints of an earlier run", where=str(self.folder), remedy=remedy)

    def _read(self, step: int) -> Snapshot:
        folder = self.path(step)
        told = json.loads((folder / STATE).read_text("utf-8"))
        warnings = _compare(told["fingerprint"], self.fingerprint, folder)
        tensors = safetensors.torch.load_file(str(folder / TENSORS))
        return Snapshot(step, folder, tensors, told["state"], warnings)

    def _faults(self, step: int) -> list[Fault]:
        """Check digests, then that the manifest says nothing but what was written: any changed byte is a fault."""
        folder = self.path(step)
        try:
            return store.verify_folder(folder) or self._oddities(step, folder)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            return [Fault(str(folder), f"has no readable manifest ({type(error).__name__}: {error})")]

    def _oddities(self, step: int, folder: Path) -> list[Fault]:
        text = (folder / store.MANIFEST).read_text("utf-8")
        told = json.loads(text)
        if (
            set(told) != {"format", "about", "files"}
            or told["format"] != FORMAT
            or set(told["files"]) != {TENSORS, STATE}
        ):
            return [Fault(str(folder), "has a manifest of another format")]
        if json.dumps(told, ensure_ascii=False, indent=2) + "\n" != text:
            return [Fault(str(folder / store.MANIFEST), "is not as it was written")]
        state = json.loads((folder / STATE).read_text("utf-8"))
        if told["about"] != {"step": state["step"], "pin": state["pin"]} or state["step"] != step:
            return [Fault(str(folder), f"says that it is step {state['step']}")]
        return []

    def _rotate(self) -> None:
        """Keep the newest `keep` and whatever they pin."""
        steps = self.steps()
        kept = set(steps[-self.keep :])
        kept |= {pin for step in kept if (pin := _pin(self.path(step))) is not None}
        for step in steps:
            if step not in kept:
                with suppress(OSError):  # the new one is safe; a disk that keeps refusing stops the next save
                    _remove(self.path(step))

    def _room(self, needed: float) -> None:
        free = store.free_bytes(self.folder)
        if free < needed:
            raise StorageError(
                f"a checkpoint needs {needed / 1e6:,.1f} MB free and the disk has {free / 1e6:,.1f}",
                where=str(self.folder),
                remedy="free some space and run the same command with --resume; what was saved before is intact",
            )
        if _no_inodes(self.folder):
            raise StorageError("the disk can hold no more files", where=str(self.folder), remedy="remove some files")


@contextmanager
def opened(folder: Path, *, keep: int = 2, fingerprint: Mapping[str, Any] | None = None) -> Iterator[Checkpoints]:
    """Checkpoints under a lock of their own, for loops outside a run; BusyError names the process that holds them."""
    with store.Run(folder).lock():
        store.sweep_staging(folder)
        yield Checkpoints(folder, keep=keep, fingerprint=fingerprint)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Refuse a checkpoint of another task; say loudly when the machine differs."""
    faults = [
        Fault(key, f"was {then!r} and is now {now!r}")
        for key, then, now in _differences(old.get("task"), new.get("task"))
    ]
    if faults:
        raise CheckpointError(
            "this checkpoint belongs to another task", where=str(folder), faults=faults,
            remedy="restore these settings, or give the run another `name`",
        )  # fmt: skip
    changed = [f"{key} {then} -> {now}" for key, then, now in _differences(old.get("machine"), new.get("machine"))]
    return (f"resume is correct but not bit-exact: {', '.join(changed)}",) if changed else ()


def _differences(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Iterator[tuple[str, Any, Any]]:
    old, new = old or {}, new or {}
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_free(key: str) -> bool:
    return key in FREE_OF_CHOICE or key.split(".")[0] in FREE_OF_CHOICE


def _pin(folder: Path) -> int | None:
    """The step that a checkpoint pins; an unreadable one pins nothing (and is found out when it is read)."""
    try:
        pin = store.manifest(folder)["about"]["pin"]
    except (UsageError, StorageError, KeyError, TypeError):
        return None
    return pin if isinstance(pin, int) else None


def _no_inodes(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    told = os.statvfs(folder)
    return told.f_files > 0 and told.f_favail < 16  # f_files is 0 where the file system does not count


def _remove(folder: Path) -> None:
    """Rename first, so that a kill in the middle leaves staging to sweep and no half checkpoint."""
    aside = folder.with_name(f"{store.STAGING}drop-{folder.name}-{secrets.token_hex(4)}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _plain_storage_errors(final: Path) -> Iterator[None]:
    """safetensors reports a full disk as its own error; make it the sentence that the rest of the house uses."""
    try:
        yield
    except safetensors.SafetensorError as error:
        remedy = "free some space and run the same command with --resume; what was saved before is intact"
        raise StorageError(f"the checkpoint could not be written ({error})", where=str(final), remedy=remedy) from error
