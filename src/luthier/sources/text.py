"""Plain text: documents with an empty line between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from luthier.contracts import Source
from luthier.data import lines
from luthier.errors import Fault
from luthier.records import Origin, Row


class Text(Source):
    """Each block of lines without an empty line in it is one document, a row `{text: ...}`.

    A row bears its first line's number. The cursor packs line and byte (`data.lines`).
    """

    suffixes = (".txt", ".text")

    def rows(self, path: Path, *, encoding: str | None = None, start: int = 0) -> Iterator[Row | Fault]:
        """Yield a row for each block; a block with a line that cannot be read is a fault."""
        block: list[lines.Line] = []
        for line in lines.read(path, encoding, start):
            if line.number == 1 and _is_object(line.text):
                yield Fault(f"{path}:1", "holds JSON Lines, not plain text", "name the file .jsonl")
                return
            if line.text.strip() or line.problem:
                block.append(line)
            elif block:
                yield from _document(block, path)
                block = []
        if block:
            yield from _document(block, path)


def _is_object(text: str) -> bool:
    try:
        return bool(isinstance(json.loads(text), dict))
    except (ValueError, RecursionError):
        return False


def _document(block: list[lines.Line], path: Path) -> Iterator[Row | Fault]:
    broken = [line.fault(path) for line in block if line.problem]
    if broken:
        yield from broken
        return
    text = "".join(line.text for line in block).replace("\r\n", "\n").rstrip("\n")
    yield Row({"text": text}, Origin(str(path), block[0].number), block[-1].cursor)
