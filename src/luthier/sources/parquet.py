"""Parquet tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.contracts import Source
from luthier.data.encoding import open_bytes
from luthier.errors import Fault
from luthier.records import Origin, Row

BATCH = 256  # rows that are in memory at a time


class Parquet(Source):
    """Rows are numbered from 1, for want of lines. The cursor is the number of rows before."""

    suffixes = (".parquet", ".pq")

    def rows(self, path: Path, *, encoding: str | None = None, start: int = 0) -> Iterator[Row | Fault]:
        """Yield the rows after the first `start`; texts are UTF-8 by definition, so `encoding` says nothing."""
        import pyarrow as arrow

        try:
            for number, value in _values(path, start):
                yield Row(value, Origin(str(path), number), number)
        except (arrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            yield Fault(str(path), f"is not readable as Parquet ({reason})", "write the file again")


def _values(path: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as arrow
    import pyarrow.parquet

    compressed = path.suffix.lower() == ".gz"
    with open_bytes(path) as file:
        table = arrow.parquet.ParquetFile(arrow.BufferReader(file.read()) if compressed else file)
        number = 0
        for group in range(table.metadata.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            for batch in table.iter_batches(BATCH, row_groups=[group]):
                for value in batch.to_pylist():
                    number += 1
                    if number > start:
                        yield number, value
