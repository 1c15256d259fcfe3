"""Tables as text: comma, semicolon or tab separated, with a header line."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from luthier.contracts import Source
from luthier.data import columns, lines
from luthier.errors import Fault
from luthier.records import Origin, Row

DELIMITERS = ",;\t|"
SAMPLE = 100
csv.field_size_limit(lines.LONGEST)


class Csv(Source):
    """A header line names the columns; the delimiter is the one that the header uses. Quoted texts may span lines.

    A row bears the line on which it starts. The cursor packs line and byte (`data.lines`).
    """

    suffixes = (".csv", ".tsv")

    def rows(self, path: Path, *, encoding: str | None = None, start: int = 0) -> Iterator[Row | Fault]:
        """Yield a row or a fault for each record after the header."""
        feed = _Feed(lines.read(path, encoding))
        header, delimiter = _header(feed)
        if faults := _header_faults(feed, header, path):
            yield from faults
            return
        if start:
            feed = _Feed(lines.read(path, encoding, start), lines.unpack(start)[0])
        records = csv.reader(feed, delimiter=delimiter, strict=True)
        sample: list[Mapping[str, str]] = []
        while True:
            first = feed.number + 1
            try:
                fields = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                yield from feed.faults(path) or [_malformed(f"{path}:{first}", error)]
                continue
            if faults := feed.faults(path):
                yield from faults
            elif fields:
                row = _row(fields, header, Origin(str(path), first), feed.cursor, sample)
                if isinstance(row, Row) and len(sample) < SAMPLE:
                    sample.append(row.value)
                yield row


class _Feed:
    """Lines for the csv module, which takes one at a time; what is wrong with them is kept for the record's end."""

    def __init__(self, source: Iterator[lines.Line], before: int = 0) -> None:
        self._source, self._before = source, before
        self._broken: list[lines.Line] = []
        self._last: lines.Line | None = None

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        self._last = next(self._source)
        if self._last.problem:
            self._broken.append(self._last)
        return self._last.text.replace("\0", "")

    @property
    def number(self) -> int:
        return self._last.number if self._last else self._before

    @property
    def cursor(self) -> int:
        return self._last.cursor if self._last else 0

    def faults(self, path: Path) -> list[Fault]:
        """Hand over what was wrong with the lines since the last call."""
        broken, self._broken = self._broken, []
        return [line.fault(path) for line in broken]


def _header(feed: _Feed) -> tuple[list[str], str]:
    """The column names and the delimiter between them."""
    first = next(feed, "")
    outside = "".join(first.split('"')[::2])
    delimiter = max(DELIMITERS, key=outside.count)
    try:
        fields = next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error:
        fields = []
    return [name.strip() for name in fields], delimiter


def _header_faults(feed: _Feed, header: Sequence[str], path: Path) -> list[Fault]:
    if faults := feed.faults(path):
        return faults
    if not any(header):
        return [Fault(f"{path}:1", "has no header line", "name the columns in the first line, such as prompt,answer")]
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    return [Fault(f"{path}:1", f"the column {name!r} stands twice", "give each a name of its own") for name in twice]


def _row(
    fields: list[str], header: Sequence[str], origin: Origin, cursor: int, sample: Sequence[Mapping[str, str]]
) -> Row | Fault:
    """The row that a record holds; `sample` are good rows, from which a remedy guesses the columns that matter."""
    named = {name: value for name, value in zip(header, fields, strict=False) if name}
    if len(fields) < len(header) and any(header[len(fields) :]):
        what = f"has {len(fields)} of {len(header)} columns"
        return Fault(str(origin), what, "fill in the row, or quote a text that holds a line break")
    names = [*header, *[""] * (len(fields) - len(header))]
    stray = [value for name, value in zip(names, fields, strict=False) if not name and value.strip()]
    if stray:
        what = f"text in a column without a name ({_short(stray[0])})"
        wish = columns.written(columns.guess(sample or [named]), skip=True)
        return Fault(str(origin), what, f"quote the text that holds the delimiter, or leave such rows out: {wish}")
    return Row(named, origin, cursor)


def _malformed(where: str, error: csv.Error) -> Fault:
    if "field larger" in str(error):
        return Fault(where, "a quoted text goes on for more than 8 MiB", "close the quote that opens on this line")
    if "unexpected end" in str(error):
        return Fault(where, "the quote that opens here is never closed", "close it")
    remedy = 'write a quote inside a quoted text twice: ""'
    return Fault(where, f"is not CSV ({error})", remedy)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 40 else text[:39] + "…")
