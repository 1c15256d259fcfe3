"""Rendered rows on disk: tokenised once, memory-mapped, made into Python objects where a step needs them.

`tokens/<key>/` in luthier's cache holds the rows as one Arrow file, what became of the others (dropped, cut, refused)
as JSON, and a manifest with the digests of both. The key is the content of everything that decides a token or a weight:
rows, template, tokenizer, limit, truncation, and the code of this room. So nothing there can be out of date, a damaged
folder is rebuilt, and the least recently used ones go when all together are larger than `LIMIT`.

Fewer than `FROM` rows stay in memory: they are tokenised in about a second, which no file is worth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from luthier import store
from luthier.contracts import Template
from luthier.errors import Fault, LuthierError, StorageError
from luthier.records import Example, IntArray, Rendered
from luthier.text.render import Rendering, render_all
from luthier.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow

FROM = 2_000  # rows
LIMIT = 4 << 30  # bytes of all folders together
BLOCK = 1 << 18  # tokens that are in memory while rows are written
ABANDONED = 24 * 3600  # seconds after which a folder that is still being written belongs to a killed process
ROWS, OUTCOME = "rows.arrow", "outcome.json"


def render_kept(
    examples: Sequence[Example],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    truncate: str = "error",
    *,
    skip: bool = False,
    folder: Path | None = None,
    at_least: int = FROM,
) -> Rendering:
    """Do what `render_all` does, from `at_least` rows on once for all later starts, in `folder` or luthier's cache.

    A cache that cannot be written (full, read-only) costs a remark and memory, not the run.
    """

    def render(keep: Callable[[Rendered], object] | None = None) -> Rendering:
        return render_all(examples, template, tokenizer, max_length, truncate, skip=skip, keep=keep)

    if len(examples) < at_least:
        return render()
    parent = folder or store.cache_dir() / "tokens"
    place = parent / key_of(examples, template, tokenizer, max_length, truncate, skip=skip)
    remarks = []
    if place.exists():
        try:
            return _reread(place, examples)
        except (LuthierError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            remarks.append(f"kept tokens were damaged and are made again ({' '.join(str(error).split())[:200]})")
    try:
        _write(place, render, examples)
        found = _reread(place, examples)
        prune(parent, spare=place)
    except (StorageError, OSError) as error:
        remarks.append(f"tokens cannot be kept in {parent} ({error}); they stay in memory")
        found = render()
    return dataclasses.replace(found, remarks=[*found.remarks, *remarks])


def key_of(
    examples: Sequence[Example],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int | None,
    truncate: str,
    *,
    skip: bool = False,
) -> str:
    """Name everything that decides the tokens, weights and losses of rows in this order, as 32 hex digits."""
    told = [
        [example.id for example in examples],
        [template.name, template.options.model_dump(mode="json"), template.source(tokenizer)],
        _digest_of_code(sys.modules[type(template).__module__].__file__ or ""),
        tokenizer.hash,
        [max_length, truncate if max_length is not None else "", skip],
    ]
    return store.content_hash(told, 32)


def prune(parent: Path, *, spare: Path | None = None, limit: int = LIMIT) -> list[Path]:
    """Remove the least recently used folders until all together hold `limit` bytes, never `spare`; say which went.

    A process that still reads one keeps its bytes: a mapped file lives until it is closed.
    """
    _sweep(parent)
    folders = [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(store.STAGING)]
    aged = sorted((path.stat().st_mtime, path, _size(path)) for path in folders)
    total, gone = sum(size for _, _, size in aged), []
    for _, path, size in aged:
        if total > limit and path != spare:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
            gone.append(path)
    return gone


class Kept(Sequence[Rendered]):
    """Rows of an Arrow file by number. A row is made when it is asked for; a slice is a view and makes none."""

    def __init__(self, blocks: _Blocks, span: range) -> None:
        self._blocks, self._span = blocks, span

    @classmethod
    def open(cls, path: Path) -> Kept:
        """Map a file that `Writer` wrote; raise StorageError where it is none."""
        blocks = _Blocks(path)
        return cls(blocks, range(blocks.rows))

    def __len__(self) -> int:
        return len(self._span)

    @overload
    def __getitem__(self, index: int) -> Rendered: ...

    @overload
    def __getitem__(self, index: slice) -> Kept: ...

    def __getitem__(self, index: int | slice) -> Rendered | Kept:
        if isinstance(index, slice):
            return Kept(self._blocks, self._span[index])
        return self._blocks.row(self._span[index])


class Writer:
    """Write rows to an Arrow file, a block of tokens at a time; a context that closes the file."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._arrow, self._rows, self._tokens = pyarrow, list[Rendered](), 0
        self._file = pyarrow.ipc.new_file(str(path), _schema())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        self._file.close()

    def append(self, row: Rendered) -> None:
        """Add a row."""
        self._rows.append(row)
        self._tokens += len(row.ids)
        if self._tokens >= BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_batch(self._arrow.record_batch(_columns(self._rows), schema=_schema()))
        self._rows, self._tokens = [], 0


class _Blocks:
    """The record batches of a mapped file, opened as they are needed, and where each one's rows begin."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        try:
            self._file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        except (pyarrow.ArrowException, OSError) as error:
            raise StorageError(f"is not an Arrow file ({error})", where=str(path)) from error
        if self._file.schema != _schema():
            raise StorageError("has other columns than luthier writes", where=str(path))
        self._open: dict[int, _Block] = {}
        sizes = [self._file.get_batch(index).num_rows for index in range(self._file.num_record_batches)]
        self._starts = np.cumsum([0, *sizes])
        self.rows = int(self._starts[-1])

    def row(self, number: int) -> Rendered:
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        if index not in self._open:
            self._open[index] = _Block(self._file.get_batch(index))
        return self._open[index].row(number - int(self._starts[index]))


class _Block:
    """The columns of one record batch, as views of the mapped file."""

    def __init__(self, batch: pyarrow.RecordBatch) -> None:
        column = batch.column
        self._ids, self._lengths, self._weights = (_Lists(column(name)) for name in ("ids", "lengths", "weights"))
        self._prompt, self._cut = (column(name).to_numpy() for name in ("prompt_length", "cut"))
        self._names = column("example_id")

    def row(self, index: int) -> Rendered:
        runs = zip(self._weights[index], self._lengths[index], strict=True)
        return Rendered(
            ids=tuple(self._ids[index]),
            weights=tuple(itertools.chain.from_iterable([weight] * length for weight, length in runs)),
            prompt_length=int(self._prompt[index]),
            example_id=self._names[index].as_py(),
            cut=int(self._cut[index]),
        )


class _Lists:
    """An Arrow column of lists, by number."""

    def __init__(self, column: Any) -> None:
        self._ends: IntArray = column.offsets.to_numpy()
        self._values: IntArray = column.values.to_numpy()

    def __getitem__(self, index: int) -> list[Any]:
        found: list[Any] = self._values[self._ends[index] : self._ends[index + 1]].tolist()
        return found


@cache
def _schema() -> Any:
    """Weights are kept as runs: a row has two or three of them, of any length."""
    import pyarrow as arrow

    return arrow.schema(
        [
            ("ids", arrow.list_(arrow.int32())),
            ("lengths", arrow.list_(arrow.int32())),  # of the runs of equal weights
            ("weights", arrow.list_(arrow.float64())),  # as a row's author wrote them, to the last bit
            ("prompt_length", arrow.int32()),
            ("cut", arrow.int32()),
            ("example_id", arrow.string()),
        ]
    )


def _columns(rows: Sequence[Rendered]) -> list[Any]:
    import pyarrow as arrow

    runs = [[(weight, len(list(run))) for weight, run in itertools.groupby(row.weights)] for row in rows]
    return [
        _lists([row.ids for row in rows], "int32"),
        _lists([[length for _, length in one] for one in runs], "int32"),
        _lists([[weight for weight, _ in one] for one in runs], "float64"),
        *(arrow.array([getattr(row, name) for row in rows], arrow.int32()) for name in ("prompt_length", "cut")),
        arrow.array([row.example_id for row in rows], arrow.string()),
    ]


def _lists(values: Sequence[Sequence[float]], kind: str) -> Any:
    import pyarrow as arrow

    ends = np.cumsum([0, *(len(one) for one in values)])
    flat = np.fromiter(itertools.chain.from_iterable(values), np.dtype(kind))
    return arrow.ListArray.from_arrays(arrow.array(ends, arrow.int32()), arrow.array(flat))


def _write(
    place: Path, render: Callable[[Callable[[Rendered], object]], Rendering], examples: Sequence[Example]
) -> None:
    """Render into a folder that is seen when it is whole; what `render` raises leaves nothing behind."""

    def fill(staging: Path) -> None:
        with Writer(staging / ROWS) as rows:
            told = render(rows.append)
        store.write_json(staging / OUTCOME, _outcome(told, examples))

    try:
        store.publish_folder(place, fill, about={"rows": len(examples)})
    except OSError:
        if not (place / store.MANIFEST).exists():  # else another process was faster with the same rows
            raise


def _outcome(told: Rendering, examples: Sequence[Example]) -> dict[str, Any]:
    """What a rendering says beside its rows; examples by their number, places by what follows a row's origin."""
    number = {id(example): index for index, example in enumerate(examples)}
    return {
        "dropped": [number[id(example)] for example in told.dropped],
        "cut": [[number[id(example)], tokens, where] for example, tokens, where in told.cut],
        "notes": told.notes,
        "refused": [
            [number[id(example)], fault.where.removeprefix(str(example.origin)), fault.what, fault.remedy]
            for example, fault in told.refused
        ],
    }


def _reread(place: Path, examples: Sequence[Example]) -> Rendering:
    """A rendering from its folder; raise StorageError where it is not whole or not of these examples."""
    if faults := store.verify_folder(place):
        raise StorageError(faults[0].what, where=faults[0].where)
    told: Mapping[str, Any] = store.read_json(place / OUTCOME)
    rows = Kept.open(place / ROWS)
    if len(rows) + len(told["dropped"]) + len(told["refused"]) != len(examples):
        raise StorageError("holds another number of rows", where=str(place))
    with suppress(OSError):  # a cache that is only read from
        os.utime(place)  # used just now: `prune` takes others first
    return Rendering(
        rendered=rows,
        dropped=[examples[index] for index in told["dropped"]],
        cut=[(examples[index], tokens, where) for index, tokens, where in told["cut"]],
        notes=dict(told["notes"]),
        refused=list(_refused(told["refused"], examples)),
    )


def _refused(told: Sequence[Sequence[Any]], examples: Sequence[Example]) -> Iterator[tuple[Example, Fault]]:
    for index, place, what, remedy in told:
        yield examples[index], Fault(f"{examples[index].origin}{place}", what, remedy)


@cache
def _digest_of_code(template: str) -> str:
    """A digest of this room's files and a template's: a mended rendering never meets the rows of the old one."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(template)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files if path.is_file())).hexdigest()


def _sweep(parent: Path) -> None:
    """Remove what killed processes left half written; what is young may still be written."""
    for path in parent.glob(f"{store.STAGING}*"):
        if time.time() - path.stat().st_mtime > ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
