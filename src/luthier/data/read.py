"""Files to examples: each file's encoding and layout found and named, every bad row a fault with its line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from luthier import registry, store
from luthier.contracts import Source
from luthier.data import formats, oasst
from luthier.data.encoding import BROKEN, detect, known, suffix
from luthier.errors import DataError, Fault, LuthierError
from luthier.records import Example, Origin, Row
from luthier.registry import suggestion

LISTED = 200  # faults that an error spells out
PROBED = 100  # rows that a file's layout is recognised from


@dataclass(frozen=True)
class FileInfo:
    """What was found in one file. `skipped` rows were bad and left out (`on_bad: skip`)."""

    path: str
    encoding: str
    format: str
    rows: int
    skipped: int
    sha256: str
    unused: tuple[str, ...] = ()  # columns that play no part
    passed_over: int = 0  # replies of conversation trees that were deleted, refused or spam

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"unused": list(self.unused)}


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of the files, and all that was wrong with the others."""

    examples: list[Example]
    faults: list[Fault] = field(default_factory=list)
    files: list[FileInfo] = field(default_factory=list)

    @cached_property
    def hash(self) -> str:
        """Content hash: equal rows in equal order have an equal hash, whatever file they came from."""
        return store.content_hash([example.id for example in self.examples])

    @property
    def skipped(self) -> int:
        return sum(info.skipped for info in self.files)


@dataclass(frozen=True)
class Parsing:
    """The settings that turn a row into an example (`DataSpec`)."""

    format: str | None = None
    columns: Mapping[str, str] | None = None
    tags: Sequence[str] = ()
    system: str | None = None
    encoding: str | None = None


class File:
    """One file, its source, and the layout of its rows."""

    def __init__(self, path: str | Path, parsing: Parsing, name: str = "") -> None:
        self.path = shown(path)
        self.parsing, self.name = parsing, name or self.path.name
        self.source = source_for(self.path)
        self.encoding = known(parsing.encoding) if parsing.encoding else detected(self.path)
        self.layout: formats.Layout | None = None
        self.unclear = False  # no layout fits its rows
        self.passed_over = 0  # replies of conversation trees that are not to be learnt from

    def rows(self, start: int = 0) -> Iterator[Row | Fault]:
        """Raw rows and faults from a cursor on."""
        return self.source.rows(self.path, encoding=self.encoding, start=start)

    def examples(self, start: int = 0) -> Iterator[tuple[int, Example | list[Fault]]]:
        """Yield (cursor of the next row, example or faults). A file without a known layout is one single fault."""
        rows = self.rows(start)
        if self.layout is None:
            first = list(islice(rows, PROBED)) if not start else list(islice(self.rows(), PROBED))
            try:
                self._recognise([row.value for row in first if isinstance(row, Row)])
            except formats.Unrecognised as error:
                yield 0, [Fault(self._first_row(first), error.what, error.remedy)]
                yield from ((0, [fault]) for fault in chain(first, rows) if isinstance(fault, Fault))
                return
            rows = chain(first, rows) if not start else rows
        for row in rows:
            yield (0, [row]) if isinstance(row, Fault) else (row.cursor, self._example(row))

    def _recognise(self, rows: list[Mapping[str, Any]]) -> None:
        if rows:
            asked = self.parsing
            self.unclear = True
            self.layout = formats.recognise(rows, format=asked.format, columns=asked.columns, tags=asked.tags)
            self.unclear = False

    def _example(self, row: Row) -> Example | list[Fault]:
        if self.layout is None:  # the first rows were all bad
            try:
                self._recognise([row.value])
            except formats.Unrecognised as error:
                return [Fault(str(row.origin), error.what, error.remedy)]
        assert self.layout is not None
        origin, asked = Origin(self.name, row.origin.line), self.parsing
        if self.layout.name == "oasst":
            self.passed_over += oasst.passed_over(row.value, self.layout.fields)
        return formats.parse(
            row.value, self.layout, origin, tags=asked.tags, system=asked.system, where=str(row.origin)
        )

    @staticmethod
    def _first_row(rows: Sequence[Row | Fault]) -> str:
        return next(str(row.origin) for row in rows if isinstance(row, Row))


def read(
    paths: Sequence[str | Path],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
    system: str | None = None,
    encoding: str | None = None,
    on_bad: str = "error",
) -> Dataset:
    """Read files into memory. With `on_bad="error"` raise one DataError with the faults of all files.

    With `on_bad="skip"` bad rows are left out; they stay in `faults` and are counted per file. A file that cannot be
    read at all (missing, no known layout, no rows) is an error either way.
    """
    parsing = Parsing(format, columns, tuple(tags), system, encoding)
    dataset, hopeless = Dataset([]), list[Fault]()
    for path, name in zip(paths, short_names(paths), strict=True):
        try:
            _read_file(File(path, parsing, name), dataset, hopeless)
        except LuthierError as error:
            hopeless.append(Fault(error.where, error.what, error.remedy))
    if hopeless or (dataset.faults and on_bad == "error"):
        raise bad_rows([*hopeless, *dataset.faults], can_skip=not hopeless)
    return dataset


def bad_rows(faults: Sequence[Fault], *, can_skip: bool = True) -> DataError:
    """One error for many faults: it spells out 200 and counts the rest; `.faults` holds them all."""
    listed = list(faults[:LISTED])
    if len(faults) > LISTED:
        listed.append(Fault("", f"... and {len(faults) - LISTED} more"))
    remedy = "mend them, or leave such rows out with `data.on_bad: skip` (they are counted)" if can_skip else ""
    error = DataError(f"{len(faults)} fault(s) in the data", remedy=remedy, faults=listed)
    error.faults = list(faults)
    return error


def source_for(path: Path) -> Source:
    """The source that reads a file's kind, by its suffix; raise DataError with what to do instead."""
    if "://" in str(path) or not path.exists():
        raise DataError("there is no such file", where=str(path), remedy=_nearest(path))
    if path.is_dir():
        raise DataError("is a folder, not a file", where=str(path), remedy=_inside(path))
    kinds: dict[str, str] = {}
    for name in registry.names("sources"):
        kinds |= dict.fromkeys(cast(type[Source], registry.find("sources", name)).suffixes, name)
    if (kind := kinds.get(suffix(path))) is None:
        raise DataError(
            f"the kind of file is not known from its name ('{path.suffix}')",
            where=str(path),
            remedy=f"use one of {', '.join(sorted(kinds))} (each also with .gz)",
        )
    return cast(Source, registry.make("sources", kind))


def detected(path: Path) -> str:
    """The file's encoding; a file too damaged to look at is left to its source, which names the place."""
    if suffix(path) in (".parquet", ".pq"):
        return "utf-8"
    try:
        return detect(path)
    except PermissionError:
        raise DataError("may not be read", where=str(path), remedy="change its permissions") from None
    except BROKEN:
        return "utf-8"


def shown(path: str | Path) -> Path:
    """A path as a person in the working directory would type it."""
    if "://" in str(path):
        return Path(path)
    near = os.path.relpath(path)
    return Path(near) if len(near) < len(str(path)) else Path(path)


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: origins stay readable and hold no private folders."""
    parts = [Path(path).parts for path in paths]
    length = 1
    while length < max(map(len, parts), default=1) and len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _read_file(file: File, dataset: Dataset, hopeless: list[Fault]) -> None:
    before, bad = len(dataset.examples), set[str]()
    faults: list[Fault] = []
    for _, item in file.examples():
        if isinstance(item, Example):
            dataset.examples.append(item)
        else:
            faults += item
            bad.add(item[0].where)
    rows = len(dataset.examples) - before
    if file.layout is None:
        hopeless += faults or [Fault(str(file.path), "has no rows", f"write {formats.ONE_ROW}")]
        return
    dataset.faults.extend(faults)
    dataset.files.append(
        FileInfo(
            str(file.path),
            file.encoding,
            str(file.layout),
            rows,
            len(bad),
            store.sha256_file(file.path),
            file.layout.unused,
            file.passed_over,
        )
    )


def _nearest(path: Path) -> str:
    if "://" in str(path):
        return "download it first, and name the file"
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    there = [other.name for other in path.parent.iterdir() if other.is_file()]
    return suggestion(path.name, there[:30]) if there else f"the folder {path.parent} is empty"


def _inside(folder: Path) -> str:
    """What to write for a folder of train, dev and test files."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    parts = {"train": ("train",), "dev": ("dev", "valid"), "test": ("test",)}
    found = {
        part: next((name for name in files if name.lower().startswith(starts)), None) for part, starts in parts.items()
    }
    wish = ", ".join(f"{part}: {folder / name}" for part, name in found.items() if name)
    return f"write data: {{{wish}}}" if wish else f"name its files: {', '.join(files[:10]) or 'it has none'}"
