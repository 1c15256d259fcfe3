"""The lines of a text file, each with its number, its decoding and the cursor at which reading can go on.

A cursor packs the number of lines before a place and its byte offset (before compression) into one integer, so that a
reader that starts in the middle of a file still names the right lines.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from luthier.data.encoding import BROKEN, detect, known, open_bytes
from luthier.errors import Fault

LONGEST = 8 << 20  # bytes of a line; a row beyond that is no example
WIDE = ("utf-16", "utf-32", "utf16", "utf32")
_OFFSET_BITS = 48


@dataclass(frozen=True, slots=True)
class Line:
    """One line with its end. With a `problem`, `text` is only an approximation and must not be used as data."""

    number: int
    text: str
    cursor: int  # of the next line
    problem: str = ""
    remedy: str = ""

    def fault(self, path: Path) -> Fault:
        return Fault(f"{path}:{self.number}", self.problem, self.remedy)


def pack(lines: int, offset: int) -> int:
    """The cursor of the place after so many lines, at a byte offset."""
    return (lines << _OFFSET_BITS) | offset


def unpack(cursor: int) -> tuple[int, int]:
    """Lines before the cursor, and its byte offset."""
    return cursor >> _OFFSET_BITS, cursor & ((1 << _OFFSET_BITS) - 1)


def read(path: Path, encoding: str | None = None, start: int = 0) -> Iterator[Line]:
    """Yield the lines of a file from a cursor on. Memory is flat: a line beyond 8 MiB is passed over and reported."""
    number, offset = unpack(start)
    try:
        encoding = known(encoding) if encoding else detect(path)
        narrow = "utf-8" if _is_wide(encoding) or encoding == "utf-8-sig" else encoding
        with _as_bytes(path, encoding) as file:
            file.seek(offset)
            while True:
                raw, skipped = _one(file)
                if not raw:
                    return
                number, offset = number + 1, offset + len(raw) + skipped
                yield _decoded(raw, number, pack(number, offset), narrow, bool(skipped))
    except BROKEN as error:
        yield Line(number + 1, "", start, f"the file is damaged here ({error})", "copy or write the file again")


def read_whole(path: Path, encoding: str | None = None) -> tuple[str, dict[int, Line]]:
    """Return a file's text and the lines that cannot be decoded (their place in the text is approximate)."""
    try:
        encoding = known(encoding) if encoding else detect(path)
        with _as_bytes(path, encoding) as file:
            data = file.read()
    except BROKEN as error:
        return "", {1: Line(1, "", 0, f"the file is damaged ({error})", "copy or write the file again")}
    narrow = "utf-8" if _is_wide(encoding) or encoding == "utf-8-sig" else encoding
    try:
        return data.decode(narrow).removeprefix("\ufeff"), {}
    except UnicodeDecodeError:
        lines = [_decoded(raw, n, 0, narrow, False) for n, raw in enumerate(data.split(b"\n"), 1)]
        return "\n".join(line.text for line in lines), {line.number: line for line in lines if line.problem}


def _is_wide(encoding: str) -> bool:
    return encoding.lower().replace("_", "-").startswith(WIDE)


def _as_bytes(path: Path, encoding: str) -> BinaryIO:
    """The file's bytes; UTF-16 and UTF-32, whose line ends are not single bytes, are turned into UTF-8 as a whole."""
    file = open_bytes(path)
    if not _is_wide(encoding):
        return file
    with file:
        return io.BytesIO(file.read().decode(encoding).encode("utf-8"))


def _one(file: BinaryIO) -> tuple[bytes, int]:
    """The next line, cut at 8 MiB, and how many of its bytes were passed over."""
    raw, skipped = file.readline(LONGEST), 0
    if len(raw) == LONGEST and not raw.endswith(b"\n"):
        while rest := file.readline(LONGEST):
            skipped += len(rest)
            if rest.endswith(b"\n"):
                break
    return raw, skipped


def _decoded(raw: bytes, number: int, cursor: int, encoding: str, cut: bool) -> Line:
    if cut:
        what = f"the line is longer than {LONGEST >> 20} MiB"
        return Line(
            number, "\n", cursor, what, "no model trains on a row of that length: split the text, or leave it out"
        )
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not {encoding}, which the rest of the file is"
        remedy = "save the whole file as UTF-8, or name its encoding in data.encoding"
        return Line(number, raw.decode(encoding, "replace"), cursor, what, remedy)
    if "\0" in text:
        return Line(number, text, cursor, f"has a NUL character (column {text.index(chr(0)) + 1})", "take it out")
    return Line(number, text.removeprefix("\ufeff") if number == 1 else text, cursor)
