"""Which column is the question and which the answer: the names people use, and a guess to put into a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

QUESTIONS = ("query", "prompt", "input", "instruction", "question", "problem")
ANSWERS = ("response", "answer", "output", "target", "completion")
CONTEXTS = ("context", "passage", "document", "article", "history", "evidence", "schema")
LABELS = (
    "label",
    "labels",
    "category",
    "class",
    "intent",
    "sentiment",
    "sql",
    "ref",
    "reference",
    "summary",
    "translation",
)
METADATA = (
    "id", "_id", "idx", "index", "uid", "uuid", "url", "source", "timestamp", "date", "meta", "metadata", "lang",
    "language", "split", "license", "licence",
)  # fmt: skip


def guess(rows: Sequence[Mapping[str, Any]], avoid: Sequence[str] = ()) -> tuple[str, str]:
    """The likeliest (question, answer) columns, for a suggestion only; empty where there are not two.

    The answer: a known name, else the shorter texts. The question: a known name, else the longest texts.
    """
    lengths: dict[str, float] = {}
    for key in {key: None for row in rows for key in row}:
        values = [row[key] for row in rows if isinstance(row.get(key), str | int | float)]
        if values and key not in avoid and key.strip().lower() not in METADATA:
            lengths[key] = fmean(len(str(value)) for value in values)
    if len(lengths) < 2 or all(key.strip().lower() in QUESTIONS for key in lengths):
        return "", ""
    answer = _named(lengths, ANSWERS) or _named(lengths, LABELS) or _shortest(lengths)
    rest = {key: length for key, length in lengths.items() if key != answer}
    return _named(rest, QUESTIONS) or max(rest, key=lambda key: rest[key]), answer


def written(columns: tuple[str, str], *, skip: bool = False) -> str:
    """What to write in the task's YAML for a pair of columns; with `skip`, so that bad rows are left out."""
    question, answer = columns if all(columns) else ("MY_QUESTION_COLUMN", "MY_ANSWER_COLUMN")
    more = ", on_bad: skip" if skip else ""
    return f"data: {{columns: {{prompt: {question}, answer: {answer}}}{more}}}"


def _shortest(lengths: Mapping[str, float]) -> str:
    open_names = [key for key in lengths if key.strip().lower() not in QUESTIONS]
    return min(open_names, key=lambda key: lengths[key])


def _named(lengths: Mapping[str, float], names: Sequence[str]) -> str:
    return next((key for name in names for key in lengths if key.strip().lower() == name), "")
