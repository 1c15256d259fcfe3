"""JSON without its traps: a key given twice, NaN and nesting without end are faults, not surprises."""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 100  # levels of brackets; far beyond any row of text
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class Malformed(ValueError):
    """One value that cannot be used: `str(error)` says why; `at` is the place in the text."""

    def __init__(self, what: str, at: int = 0, remedy: str = "") -> None:
        super().__init__(what)
        self.at, self.remedy = at, remedy


class Reader:
    """Decodes values and remembers what is wrong with the one being read."""

    def __init__(self) -> None:
        self._wrong: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def value(self, text: str, at: int = 0) -> tuple[Any, int]:
        """Decode the value that starts at a place; return it and the place after it, or raise Malformed."""
        self._wrong.clear()
        try:
            value, end = self._decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise Malformed(_plain(error, text), error.pos, "mend the JSON there") from None
        except RecursionError:
            raise Malformed(f"is nested deeper than {DEEPEST} levels", at, "a row of text is flat") from None
        except ValueError as error:  # a number with thousands of digits
            raise Malformed(str(error).partition(";")[0], at, "write it as a text in quotes") from None
        if self._wrong:
            raise Malformed(self._wrong[0], end, "write every key once, and no NaN or Infinity")
        if too_deep(text, at, end):
            raise Malformed(f"is nested deeper than {DEEPEST} levels", end, "a row of text is flat")
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._wrong.append(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return found

    def _constant(self, name: str) -> None:
        self._wrong.append(f"{name} is not a JSON value")


def too_deep(text: str, start: int, end: int) -> bool:
    """True for brackets nested beyond `DEEPEST` (a cheap count first: almost no row needs the walk)."""
    if text.count("[", start, end) + text.count("{", start, end) <= DEEPEST:
        return False
    depth = deepest = 0
    for match in _BRACKETS.finditer(text, start, end):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        deepest = max(deepest, depth)
    return deepest > DEEPEST


def end_of(text: str, start: int) -> int | None:
    """The place after the bracketed value that starts here, by counting brackets only; None where it never ends."""
    depth = 0
    for match in _BRACKETS.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def _plain(error: json.JSONDecodeError, text: str) -> str:
    """Say what a decoder's message means for a person who wrote the line."""
    if error.msg.startswith("Invalid control character"):
        return f"a control character (U+{ord(text[error.pos]):04X}) stands bare inside a text at column {error.colno}"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
        return "the JSON breaks off before its end"
    return f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
