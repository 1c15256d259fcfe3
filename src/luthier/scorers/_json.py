"""JSON in answers: strict parsing, lenient extraction, comparable values. Extraction knows nothing of any metric."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any, Literal, NoReturn

Values = Literal["strict", "normal", "lenient"]
DEPTH = 64  # nesting beyond this is not an answer
TRIES = 64  # opening braces looked at before giving up


class Unparsable(ValueError):
    """The text is not JSON, or not one that can be compared."""


def parse(text: str) -> Any:
    """Parse a text that is JSON and nothing else; NaN, Infinity and nesting beyond `DEPTH` are refused."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Unparsable(str(error)) from None
    return _shallow(value)


def extract(text: str, wanted: type = dict) -> tuple[Any, bool]:
    """Find the JSON value in an answer: the whole text, else its first balanced object (or array, if wanted).

    Returns the value and whether the whole text was JSON. An object that is itself a field of a broken outer one is
    not taken: a cut-off record is unparsable, not a smaller record. Raises Unparsable.
    """
    try:
        return parse(text.strip()), True
    except Unparsable:
        decoder = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
    opening = "[" if wanted is list else "{"
    for match in list(re.finditer(re.escape(opening), text))[:TRIES]:
        if re.search(r'"\s*:\s*$', text[max(0, match.start() - 20) : match.start()]):
            continue
        try:
            return _shallow(decoder.raw_decode(text, match.start())[0]), False
        except (ValueError, RecursionError):
            continue
    raise Unparsable("no JSON in the answer")


def fold(text: str) -> str:
    """Compare texts as people do: NFKC, case, runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def key_of(value: Any, values: Values = "normal") -> Any:
    """Turn a JSON value into a hashable key: equal keys mean equal values. Numbers by amount, true is not 1."""
    if isinstance(value, dict):
        return "object", frozenset((name, key_of(inner, values)) for name, inner in value.items())
    if isinstance(value, list):
        return "array", tuple(key_of(inner, values) for inner in value)
    if value is None or isinstance(value, bool):
        return "constant", value if values != "lenient" or value is None else str(value).casefold()
    if isinstance(value, (int, float)):
        return ("number", value, type(value)) if values == "strict" else ("number", value)
    return _text_key(str(value), values)


def _text_key(text: str, values: Values) -> Any:
    if values == "strict":
        return "text", text
    folded = fold(text)
    if values == "lenient":
        if folded in ("true", "false"):
            return "constant", folded
        if re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", folded):
            number = float(folded)
            return "number", int(number) if number.is_integer() else number
    return "text", folded


def _shallow(value: Any) -> Any:
    """Return the value if it is nested no deeper than `DEPTH`; so that recursion over it is safe."""
    layer = [value]
    for _ in range(DEPTH):
        layer = [inner for outer in layer for inner in _inside(outer)]
        if not layer:
            return value
    raise Unparsable(f"nested deeper than {DEPTH}")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(digits)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
