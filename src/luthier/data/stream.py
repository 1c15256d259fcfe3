"""Files larger than memory: endless examples through a shuffle buffer, from a position that fits in JSON."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import store
from luthier.data.encoding import open_bytes
from luthier.data.read import File, Parsing, bad_rows, short_names
from luthier.errors import DataError, Fault
from luthier.records import Example

LOOKED_AT = 1 << 16  # first bytes of a file that must be the same on restore


@dataclass(frozen=True, slots=True)
class _Held:
    """A row in the buffer, and where it starts: file and cursor."""

    example: Example
    file: int
    cursor: int


class Stream:
    """Iterate over examples without end: every epoch gives each row once, in a new order.

    The buffer is filled, then each example that is given is drawn from it and replaced by the next row of the files;
    it is emptied at the end of an epoch. The draw is a pure function of seed, epoch and count. Memory holds `buffer`
    examples; the state holds their cursors, so a restored stream reads them again and goes on identically. A bad row
    raises DataError where it is met, or is counted in `skipped` with `on_bad="skip"` (as often as it is read).
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        tags: Sequence[str] = (),
        system: str | None = None,
        encoding: str | None = None,
        on_bad: str = "error",
        buffer: int = 10_000,
        seed: int = 0,
    ) -> None:
        parsing = Parsing(format, columns, tuple(tags), system, encoding)
        self.files = [File(path, parsing, name) for path, name in zip(paths, short_names(paths), strict=True)]
        self._skips, self._size, self._seed = on_bad == "skip", buffer, seed
        self.epoch = self.skipped = 0
        self._drawn = 0  # in this epoch
        self._buffer: list[_Held] = []
        self._place, self._cursor = 0, 0  # of the next row: index in the epoch's order of files, and cursor
        self._rows: Iterator[_Held] | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Example:
        if not self._fill():
            self._next_epoch()
        index = self._draw(len(self._buffer))
        held, self._buffer[index] = self._buffer[index], self._buffer[-1]
        self._buffer.pop()
        self._drawn += 1
        return held.example

    def state(self) -> dict[str, Any]:
        """The position, as JSON: after `restore` the next example is the one that would have come."""
        return {
            "epoch": self.epoch,
            "drawn": self._drawn,
            "skipped": self.skipped,
            "place": self._place,
            "cursor": self._cursor,
            "buffer": [[held.file, held.cursor] for held in self._buffer],
            "files": [_fingerprint(file.path) for file in self.files],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state` returned; raise DataError where the files are not the same."""
        told = list(state["files"])
        now = [_fingerprint(file.path) for file in self.files]
        if told != now:
            changed = [str(file.path) for file, was, is_ in zip(self.files, told, now, strict=False) if was != is_]
            what = f"is not the file that the stream was reading: {', '.join(changed) or 'another list of files'}"
            raise DataError(what, remedy="put the file back as it was, or start a new run")
        self.epoch, self._drawn, self.skipped = int(state["epoch"]), int(state["drawn"]), int(state["skipped"])
        self._place, self._cursor, self._rows = int(state["place"]), int(state["cursor"]), None
        self._buffer = self._read_again([(int(file), int(cursor)) for file, cursor in state["buffer"]])

    def _fill(self) -> bool:
        """Read until the buffer is full or the files end; False where nothing is left of the epoch."""
        if self._rows is None:
            self._rows = self._rest_of_epoch()
        while len(self._buffer) < self._size and (held := next(self._rows, None)) is not None:
            self._buffer.append(held)
        return bool(self._buffer)

    def _next_epoch(self) -> None:
        if not self._drawn:
            raise DataError("the files hold no rows to learn from", where=", ".join(str(f.path) for f in self.files))
        self.epoch, self._drawn, self._place, self._cursor, self._rows = self.epoch + 1, 0, 0, 0, None
        self._fill()

    def _rest_of_epoch(self) -> Iterator[_Held]:
        """The rows from the present position to the end of the epoch; moves the position."""
        order = sorted(range(len(self.files)), key=lambda file: _hash(self._seed, self.epoch, "file", file))
        while self._place < len(order):
            index = order[self._place]
            before = self._cursor
            for cursor, item in self.files[index].examples(before):
                if isinstance(item, Example):
                    held, before = _Held(item, index, before), cursor
                    self._cursor = cursor
                    yield held
                else:
                    self._bad(index, item)
            self._place, self._cursor = self._place + 1, 0

    def _bad(self, index: int, faults: Sequence[Fault]) -> None:
        if not self._skips or self.files[index].unclear:
            raise bad_rows(faults, can_skip=not self.files[index].unclear)
        self.skipped += 1

    def _read_again(self, wanted: Sequence[tuple[int, int]]) -> list[_Held]:
        """The rows that start at given places, in that order: one pass through each file, from the first such place."""
        by_file: dict[int, set[int]] = defaultdict(set)
        for file, cursor in wanted:
            by_file[file].add(cursor)
        found: dict[tuple[int, int], _Held] = {}
        for file, cursors in by_file.items():
            before = min(cursors)
            for cursor, item in self.files[file].examples(before):
                if isinstance(item, Example):
                    if before in cursors:
                        found[file, before] = _Held(item, file, before)
                        cursors.discard(before)
                    before = cursor
                if not cursors:
                    break
        return [found[place] for place in wanted]

    def _draw(self, size: int) -> int:
        return _hash(self._seed, self.epoch, "row", self._drawn) % size


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _fingerprint(path: Path) -> str:
    """Size and first bytes of a file: cheap enough for files of any size."""
    with open_bytes(path) as file:
        return store.content_hash([path.stat().st_size, hashlib.sha256(file.read(LOOKED_AT)).hexdigest()])
