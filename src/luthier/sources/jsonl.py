"""JSON Lines: one object a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from luthier.contracts import Source
from luthier.data import lines
from luthier.errors import Fault
from luthier.records import Origin, Row
from luthier.sources._strict import Malformed, Reader


class Jsonl(Source):
    """One JSON object a line; empty lines are passed over. The cursor packs line and byte (`data.lines`)."""

    suffixes = (".jsonl", ".ndjson")

    def rows(self, path: Path, *, encoding: str | None = None, start: int = 0) -> Iterator[Row | Fault]:
        """Yield a row or a fault for each line that is not empty."""
        reader = Reader()
        for line in lines.read(path, encoding, start):
            if line.problem:
                yield line.fault(path)
            elif text := line.text.strip():
                yield _row(reader, text, path, line)


def _row(reader: Reader, text: str, path: Path, line: lines.Line) -> Row | Fault:
    where = f"{path}:{line.number}"
    try:
        value, end = reader.value(text)
    except Malformed as error:
        return Fault(where, str(error), error.remedy)
    if end < len(text):
        return Fault(where, f"goes on after its value at column {end + 1}", "write one object a line")
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        return Fault(where, f"is a {kind}, not an object", 'write {"prompt": "...", "answer": "..."}')
    return Row(value, Origin(str(path), line.number), line.cursor)
