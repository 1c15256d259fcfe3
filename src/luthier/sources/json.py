"""A JSON file that holds many rows: an array, an object around one array, or objects one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.contracts import Source
from luthier.data import lines
from luthier.errors import Fault
from luthier.records import Origin, Row
from luthier.sources._strict import Malformed, Reader, end_of

_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,]*")
ROW_KEYS = {"messages", "conversations", "conversation"}  # an object with one of these is itself a row


class Json(Source):
    """The file is read whole: keep what is larger than memory in JSON Lines. The cursor is the number of rows before.

    Each row bears the line on which it starts. After a row that is not JSON, reading goes on behind its brackets.
    """

    suffixes = (".json",)

    def rows(self, path: Path, *, encoding: str | None = None, start: int = 0) -> Iterator[Row | Fault]:
        """Yield the rows after the first `start`, and a fault for each that cannot be read."""
        text, broken = lines.read_whole(path, encoding)
        for line in broken.values():
            yield line.fault(path)
        walk = _Walk(text, path, set(broken))
        for index, row in enumerate(walk.rows(), 1):
            if index > start and row is not None:
                yield row if isinstance(row, Fault) else Row(row.value, row.origin, index)


class _Walk:
    """One pass through a text, value by value, that knows the line it is on."""

    def __init__(self, text: str, path: Path, broken: set[int]) -> None:
        self.text, self.path, self.broken = text, path, broken
        self.reader = Reader()
        self.line, self._counted = 1, 0

    def rows(self) -> Iterator[Row | Fault | None]:
        """Every row or fault; None for a row on a line that is a fault already."""
        start = _after(_SPACE, self.text, 0)
        if start == len(self.text):
            return
        if self.text[start] == "[":
            yield from self.elements(start + 1, "]")
            return
        try:
            first, end = self.reader.value(self.text, start)
        except Malformed:
            first, end = None, start
        alone = _after(_SPACE, self.text, end) == len(self.text)
        if not alone or not isinstance(first, dict) or ROW_KEYS & first.keys():
            yield from self.elements(start, "")  # JSON Lines under another name, or a single row
            return
        arrays = [key for key, value in first.items() if isinstance(value, list) and value]
        if len(arrays) == 1 and isinstance(first[arrays[0]][0], dict):
            place = self.array(start, arrays[0])
            yield from self.elements(place, "]")
        elif len(arrays) > 1:
            what = f"an object with {len(arrays)} lists ({', '.join(map(repr, arrays))}): which one holds the rows?"
            yield Fault(f"{self.path}:1", what, "keep that list alone in the file, as [...]")
        else:
            yield from self.elements(start, "")

    def array(self, start: int, wanted: str) -> int:
        """The place behind the `[` of a key's value inside the object that starts here."""
        at = start + 1
        while True:
            key, at = self.reader.value(self.text, _after(_BETWEEN, self.text, at))
            at = _after(_SPACE, self.text, _after(_SPACE, self.text, at) + 1)  # behind the colon
            if key == wanted:
                return at + 1
            _, at = self.reader.value(self.text, at)

    def elements(self, at: int, close: str) -> Iterator[Row | Fault | None]:
        """The values from a place on, up to the closing bracket (none: up to the end)."""
        while True:
            at = _after(_BETWEEN, self.text, at)
            line = self.line_of(at)
            if at == len(self.text):
                if close:
                    yield Fault(f"{self.path}:{line}", "the list has no end", f"close it with {close}")
                return
            if close and self.text[at] == close:
                return
            row, after = self.element(at, line)
            if after is None:
                yield row
                return
            within = range(line, self.line_of(after) + 1)
            yield None if self.broken.intersection(within) else row
            at = after

    def element(self, at: int, line: int) -> tuple[Row | Fault, int | None]:
        """The value here and the place after it; None where nothing after it can be read."""
        where = f"{self.path}:{line}"
        try:
            value, end = self.reader.value(self.text, at)
        except Malformed as error:
            after = end_of(self.text, at) if self.text[at] in "[{" else None
            rest = "" if after else "; what follows cannot be read"
            if self.text.count("\n", at, error.at) and "column" in str(error):
                where = f"{self.path}:{line + self.text.count(chr(10), at, error.at)}"
            return Fault(where, f"{error}{rest}", error.remedy), after
        return self.checked(value, where, line), end

    def checked(self, value: Any, where: str, line: int) -> Row | Fault:
        if isinstance(value, dict):
            return Row(value, Origin(str(self.path), line))
        kind = "null" if value is None else type(value).__name__
        return Fault(where, f"a {kind}, not an object", 'a row is {"prompt": "...", "answer": "..."}')

    def line_of(self, place: int) -> int:
        """The line of a place; places only grow."""
        self.line += self.text.count("\n", self._counted, place)
        self._counted = max(self._counted, place)
        return self.line


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
