"""The only one who knows where things lie on disk. Everything is written so that a kill leaves the old or the new.

A published folder is staged beside its final place, each file flushed to disk, `manifest.json` written last with the
size and SHA-256 of every file, and then renamed (reliability: no half checkpoint is ever visible).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import BusyError, Fault, StorageError, UsageError

MANIFEST = "manifest.json"
STAGING = ".staging-"
NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")


def cache_dir() -> Path:
    """Where models are kept: `LUTHIER_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("LUTHIER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen).expanduser() if chosen else Path(base).expanduser() / "luthier"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(value: Any, length: int = 16) -> str:
    """Short hash of any JSON-like value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically: the old or the new content, never a mix, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{STAGING}{path.name}-{secrets.token_hex(4)}")
    with _storage_errors(path), _removed_on_error(staged):
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
        _fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8", "surrogatepass"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically (indented, keys in the given order)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is a StorageError that names it."""
    try:
        return json.loads(path.read_text("utf-8", "surrogatepass"))
    except FileNotFoundError:
        raise UsageError("does not exist", where=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"is not readable JSON ({error})", where=str(path)) from error


def write_jsonl(path: Path, values: Iterator[Any] | list[Any]) -> None:
    """Replace a JSON-lines file atomically."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values))


def append_jsonl(path: Path, value: Any) -> None:
    """Add one line to a JSON-lines log (a torn last line after a kill is dropped by `read_jsonl`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def read_jsonl(path: Path) -> list[Any]:
    """Read a JSON-lines log that we wrote; an incomplete last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8", "surrogatepass").split("\n")  # as `write_text` writes
    values = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            if index < len(lines) - 1:
                raise StorageError("is damaged", where=f"{path}:{index + 1}") from None
    return values


def publish_folder(final: Path, fill: Callable[[Path], None], *, about: Mapping[str, Any] | None = None) -> None:
    """Write a folder as a whole: `fill(staging)` writes files, then a manifest seals it and a rename shows it.

    An existing folder of that name is replaced. `about` is stored in the manifest. Raises StorageError, and leaves
    what was there before, when the disk is full or read-only.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.parent / f"{STAGING}{final.name}-{secrets.token_hex(4)}"
    with _storage_errors(final), _removed_on_error(staging):
        staging.mkdir()
        fill(staging)
        files = {}
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            name = path.relative_to(staging).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(staging / MANIFEST, {"format": 1, "about": dict(about or {}), "files": files})
        if final.exists():
            aside = final.parent / f"{STAGING}old-{final.name}-{secrets.token_hex(4)}"
            os.rename(final, aside)
            os.rename(staging, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(staging, final)
        _fsync_folder(final.parent)


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder."""
    return dict(read_json(folder / MANIFEST))


def verify_folder(folder: Path) -> list[Fault]:
    """Compare every file with the manifest; an empty list means that the folder is whole."""
    try:
        files = manifest(folder)["files"]
    except (UsageError, StorageError, KeyError, TypeError) as error:
        return [Fault(str(folder), f"has no readable manifest ({error})")]
    faults = []
    for name, told in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(Fault(str(path), "is missing"))
        elif path.stat().st_size != told["size"] or sha256_file(path) != told["sha256"]:
            faults.append(Fault(str(path), "has other bytes than the manifest says"))
    return faults


def sweep_staging(parent: Path) -> None:
    """Remove what a killed process left half written, and put back a folder caught between its two renames."""
    if not parent.is_dir():
        return
    for path in parent.glob(f"{STAGING}*"):
        old = re.fullmatch(rf"{re.escape(STAGING)}old-(.+)-[0-9a-f]{{8}}", path.name)
        if old and not (parent / old.group(1)).exists():
            os.rename(path, parent / old.group(1))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Run:
    """A run's folder and the names of everything in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = folder / "run.yaml"
        self.record = folder / "record.json"
        self.steps = folder / "steps.jsonl"
        self.split = folder / "split.json"
        self.predictions = folder / "predictions"
        self.report = folder / "report.json"
        self.html = folder / "report.html"
        self.adapter = folder / "adapter"
        self.checkpoints = folder / "checkpoints"
        self.lockfile = folder / ".lock"

    @property
    def name(self) -> str:
        return self.folder.name

    def update(self, **facts: Any) -> dict[str, Any]:
        """Merge facts into `record.json` and return the whole record."""
        record = {**(read_json(self.record) if self.record.exists() else {}), **facts}
        write_json(self.record, record)
        return record

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run against a second process; raise BusyError with the owner's pid. The kernel frees it on death."""
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lockfile.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise BusyError(
                    f"is in use by process {file.read().strip() or 'unknown'}",
                    where=str(self.folder),
                    remedy="wait for it, stop it, or choose another `name`",
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def open_run(path: str | Path) -> Run:
    """An existing run by its folder, or by its name below `runs/`; raise UsageError with the names there are."""
    for folder in (Path(path), Path("runs") / str(path)):
        if (folder / "run.yaml").is_file():
            return Run(folder)
    there = sorted(p.parent.name for p in Path("runs").glob("*/run.yaml"))
    raise UsageError(f"no run at '{path}'", remedy=f"runs here: {', '.join(there) or 'none'}")


def free_bytes(folder: Path) -> int:
    """Free space on the disk that holds `folder` (or its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _removed_on_error(staged: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if staged.is_dir():
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.unlink(missing_ok=True)
        raise


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence; other OS errors pass."""
    plain = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the disk is read-only",
        errno.EIO: "the disk reports an input/output error",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in plain:
            raise
        remedy = "free some space and run the same command with --resume; what was saved before is intact"
        raise StorageError(plain[error.errno], where=str(path), remedy=remedy) from error
