"""Make an over-long row fit by cutting what people wrote, never the template's own text; say what was cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace

from luthier.records import Example, Rendered

Offsets = Callable[[str], list[tuple[int, tuple[int, int]]]]
Measure = Callable[[Example], Rendered]


def shorten(example: Example, limit: int, side: str, offsets: Offsets, measure: Measure) -> tuple[Rendered | None, str]:
    """Cut a row to `limit` tokens from `left` or `right` (see `render`); return it with what was cut.

    None, with what stands in the way, if it cannot fit.
    """
    if not example.prompt:
        return _cut_message(example, 0, limit, side, offsets, measure), f"{_end(side)} of the text"
    shorter, where = example, ""
    if side == "left":
        shorter = _drop_turns(example, limit, measure)
        if (row := measure(shorter)) and len(row.ids) <= limit:
            return row, "the oldest turns"
        where = "the oldest turns and " if shorter is not example else ""
    question = _question(shorter)
    if question is not None:
        row_or_none = _cut_message(shorter, question, limit, side, offsets, measure)
        if row_or_none is not None:
            return row_or_none, f"{where}the {_end(side)} of the question"
    row = measure(shorter)
    if side == "right" and row.prompt_length + 1 < limit:
        return dataclasses.replace(row, ids=row.ids[:limit], weights=row.weights[:limit]), "the end of the answer"
    if side == "right" and sum(message.role == "user" for message in example.prompt) > 1:
        return None, "with `right`, the earlier turns"
    return None, "the answer" if row.prompt_length < limit else "the template's and the system's text"


def _end(side: str) -> str:
    return "start" if side == "left" else "end"


def _question(example: Example) -> int | None:
    """Index of the last message before the answer that a person or a tool wrote."""
    prompt = list(enumerate(example.prompt))
    return next((i for i, m in reversed(prompt) if m.role not in ("system", "assistant")), None)


def _drop_turns(example: Example, limit: int, measure: Measure) -> Example:
    """Leave out as few of the oldest exchanges as needed; system messages stay, what is left starts with a user."""
    head = tuple(message for message in example.prompt if message.role == "system")
    rest = [message for message in example.messages if message.role != "system"]
    shorter = example
    starts = [index for index, message in enumerate(rest[:-1]) if message.role == "user"][1:]
    for start in starts:
        shorter = replace(example, messages=(*head, *rest[start:]))
        if len(measure(shorter).ids) <= limit:
            break
    return shorter


def _cut_message(
    example: Example, index: int, limit: int, side: str, offsets: Offsets, measure: Measure
) -> Rendered | None:
    """Cut tokens off one message's text until the row fits; None if nothing of it would be left."""
    message = example.messages[index]
    spans = [span for _, span in offsets(message.content)]
    row, away = measure(example), 0
    while len(row.ids) > limit:
        away += len(row.ids) - limit
        if away >= len(spans):
            return None
        left = message.content[spans[away - 1][1] :]
        content = left if side == "left" else message.content[: spans[-away][0]]
        if not content.strip():
            return None
        shorter = replace(message, content=content)
        row = measure(replace(example, messages=(*example.messages[:index], shorter, *example.messages[index + 1 :])))
    return row
