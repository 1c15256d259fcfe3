"""Keep control tokens out of content: what a person writes is text, even where it spells `<|im_end|>`.

Before a template sees a message, each control token's spelling inside it is wrapped in two Unicode noncharacters
(U+FDD0 .. U+FDEF are reserved for a program's own use). The tokenizer encodes what stands between them as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

OPEN, CLOSE, ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2"
# Noncharacters that the content itself holds are spelt out, so that nobody can forge or lose a mark.
_SPELT = {ord(OPEN): ESCAPE + "0", ord(CLOSE): ESCAPE + "1", ord(ESCAPE): ESCAPE + "2"}
_READ = {ESCAPE + "0": OPEN, ESCAPE + "1": CLOSE, ESCAPE + "2": ESCAPE}
_MARKS = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")
_ESCAPES = re.compile(f"{ESCAPE}([012])")


@lru_cache(64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    if not longest_first:
        return re.compile("(?!)")
    first = "".join(sorted({re.escape(token[0]) for token in longest_first}))  # Gemma has 6,000 such tokens
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})")


def mark(value: Any, tokens: Iterable[str]) -> Any:
    """Wrap every spelling of a control token in a string, or in all strings of nested lists and mappings."""
    pattern = _pattern(tuple(tokens))
    return _mark(value, pattern)


def _mark(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        spelt = value.translate(_SPELT) if not value.isascii() else value
        return pattern.sub(f"{OPEN}\\g<0>{CLOSE}", spelt)
    if isinstance(value, Mapping):
        return {_mark(key, pattern): _mark(item, pattern) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark(item, pattern) for item in value]
    return value


def unmark(text: str) -> str:
    """Take all marks off: the text as the person wrote it."""
    return _read(text.replace(OPEN, "").replace(CLOSE, ""))


def stretches(text: str) -> Iterator[tuple[str, bool]]:
    """Split rendered text into (stretch, is it the content's own spelling of a control token?), without marks.

    A template may cut content between the marks (`split`); what is left of a pair still parts the text, so that two
    halves cannot join into a control token.
    """
    if OPEN not in text and CLOSE not in text:
        if text:
            yield _read(text), False
        return
    at = 0
    for found in _MARKS.finditer(text):
        if found.start() > at:
            yield _read(text[at : found.start()]), False
        if found.group(1):
            yield _read(found.group(1)), True
        at = found.end()
    if at < len(text):
        yield _read(text[at:]), False


def find(text: str, tokens: Iterable[str]) -> tuple[int, int] | None:
    """Where the first control token [begin, end) stands that the template wrote, not the content."""
    for found in _outside(tuple(tokens)).finditer(text):
        if not found.group().startswith(OPEN):
            return found.span()
    return None


@lru_cache(64)
def _outside(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"{OPEN}[^{OPEN}{CLOSE}]*{CLOSE}|{_pattern(tokens).pattern}")


def _read(text: str) -> str:
    return _ESCAPES.sub(lambda found: _READ[found.group()], text) if ESCAPE in text else text
