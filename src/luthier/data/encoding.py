"""Which text encoding a file has: found from its bytes, named, and never guessed silently past what the bytes allow."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from luthier.errors import UsageError

CHUNK = 1 << 20
BROKEN = (EOFError, OSError, zlib.error, UnicodeDecodeError)  # what reading a damaged file raises
SAMPLE = 1 << 20  # bytes of lines with non-ASCII characters that are looked at
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LIKE_UTF8 = re.compile(rb"[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf7][\x80-\xbf]{3}")  # its shape only
CHINESE = {"gb2312", "gbk", "cp936", "hz", "gb18030"}  # all are read with their superset
WESTERN = {"latin_1", "cp1252", "cp1250", "cp1254", "cp1257", "iso8859_15"}
EASTERN = ("gb", "hz", "big5", "cp93", "cp949", "cp950", "euc", "shift", "johab", "iso2022")
RARE = ("cp4", "cp7", "cp8", "mac_", "hp_", "ptcp")  # what a guess by frequency says of a few odd bytes


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading bytes, through gzip where its name ends in `.gz`."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def suffix(path: Path) -> str:
    """The lower-case suffix that tells the kind of file: `.gz` is looked through."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def known(name: str) -> str:
    """Return the name of an encoding as a user wrote it; raise UsageError where Python has none of that name."""
    try:
        info = codecs.lookup(name)
    except LookupError:
        raise UsageError(
            f"no text encoding is called '{name}'", where="data.encoding", remedy="for instance utf-8, gb18030, cp1252"
        ) from None
    if not getattr(info, "_is_text_encoding", True):
        raise UsageError(f"'{name}' is not a text encoding", where="data.encoding", remedy="for instance utf-8")
    return name


def detect(path: Path) -> str:
    """Name the encoding of a whole file (read once, in chunks).

    A file that is UTF-8 but for a few lines is called `utf-8`, so that exactly those lines become faults; only a
    file whose non-ASCII lines are not UTF-8 is something else.
    """
    with open_bytes(path) as file:
        head = file.read(CHUNK)
        for bom, name in BOMS:
            if head.startswith(bom):
                return name
        if wide := _wide_without_bom(head[:4096]):
            return wide
        if _is_utf8(head, file):
            return "utf-8"
    return _of_sample(list(_non_ascii_lines(path)))


def _wide_without_bom(head: bytes) -> str:
    """UTF-16 text in mostly Latin letters has a NUL in every other byte."""
    half = len(head) // 2
    if half < 8:
        return ""
    if head[1::2].count(0) > 0.7 * half and head[::2].count(0) < 0.1 * half:
        return "utf-16-le"
    return "utf-16-be" if head[::2].count(0) > 0.7 * half and head[1::2].count(0) < 0.1 * half else ""


def _is_utf8(head: bytes, rest: BinaryIO) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        chunk = head
        while chunk:
            decoder.decode(chunk)
            chunk = rest.read(CHUNK)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _non_ascii_lines(path: Path) -> Iterator[bytes]:
    taken = 0
    with open_bytes(path) as file:
        while taken < SAMPLE and (line := file.readline(CHUNK)):
            if not line.isascii():
                taken += len(line)
                yield line


def _of_sample(lines: list[bytes]) -> str:
    """Decide from the lines that hold non-ASCII bytes; they are known not to be UTF-8 throughout."""
    valid = sum(_decodes(line, "utf-8") for line in lines)
    data = b"".join(lines)
    if valid >= 0.1 * len(lines) or LIKE_UTF8.sub(b"", data).isascii():
        return "utf-8"
    runs = re.findall(rb"[\x80-\xff]+", data)
    high = sum(map(len, runs))
    if high < 0.15 * len(data) and high < 3 * len(runs) and not _like_chinese(runs):
        return _western(data)  # a few odd bytes in Latin text: too little evidence for a guess by frequency
    return _by_frequency(lines, data)


def _by_frequency(lines: list[bytes], data: bytes) -> str:
    """Let charset_normalizer weigh the languages; an answer must decode nearly every line."""
    from charset_normalizer import from_bytes

    names = [match.encoding for match in from_bytes(data[:CHUNK]) if not match.encoding.startswith(RARE)]
    chinese = _like_chinese(re.findall(rb"[\x80-\xff]+", data))
    for name in names:
        if chinese and not name.startswith(EASTERN):
            name = "gb18030"
        if name in WESTERN:
            return _western(data)
        name = "gb18030" if name in CHINESE else name.replace("_", "-")
        if sum(_decodes(line, name) for line in lines) >= 0.99 * len(lines):
            return name
    decodes = sum(_decodes(line, "gb18030") for line in lines) >= 0.99 * len(lines)
    return "gb18030" if decodes and chinese else _western(data)


def _like_chinese(runs: list[bytes]) -> bool:
    """Runs of byte pairs, nearly all of them among GB2312's 3,755 usual characters or its punctuation."""
    pairs = [run[place : place + 2] for run in runs for place in range(0, len(run), 2)]
    usual = sum(re.fullmatch(rb"[\xa1-\xa3\xb0-\xd7][\xa1-\xfe]", pair) is not None for pair in pairs)
    return usual >= 0.9 * len(pairs) > 0


def _western(data: bytes) -> str:
    """latin-1, or cp1252 where its punctuation (0x80 to 0x9F) is used and all of it is defined."""
    windows = re.search(rb"[\x80-\x9f]", data) is not None
    return "cp1252" if windows and _decodes(data, "cp1252") else "latin-1"


def _decodes(data: bytes, name: str) -> bool:
    try:
        data.decode(name)
    except UnicodeDecodeError:
        return False
    return True
