"""What a set of examples looks like, in numbers: lengths, repetitions, answers, scripts, the shared instruction."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data import near
from luthier.records import Example

TOP = 10  # answers that are listed
SAMPLE = 400  # characters of a text from which its script is told
MARKS = {
    "### Question: ... ### Answer:": re.compile(r"^#{2,4} ?(Question|Answer|问题|回答)[:：]", re.MULTILINE),
    "### Instruction: ... ### Response:": re.compile(
        r"^#{2,4} ?(Instruction|Input|Response|指令|输入|输出)[:：]", re.MULTILINE
    ),
    "<|im_start|>": re.compile(r"<\|im_(start|end)\|>"),
    "[INST]": re.compile(r"\[/?INST\]|<<SYS>>"),
    "<|user|>": re.compile(r"<\|(user|assistant|system|start_header_id|eot_id|end|endoftext)\|>"),
    "<start_of_turn>": re.compile(r"<(start|end)_of_turn>"),
    "USER: ... ASSISTANT:": re.compile(r"^(USER|ASSISTANT|Human|Assistant): ?", re.MULTILINE),
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one example as it is rendered, nothing cut."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        return self.prompt + self.answer


def spread(values: Iterable[int]) -> dict[str, float] | None:
    """min, median, p90, p99 and max (nearest rank); None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    places = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    middle = {name: ordered[max(0, math.ceil(share * len(ordered)) - 1)] for name, share in places.items()}
    return {"min": ordered[0], **middle, "max": ordered[-1]}


def profile(examples: Sequence[Example], lengths: Mapping[str, Lengths] | None = None) -> dict[str, Any]:
    """The numbers of one side; token lengths where they are handed in, by example id."""
    known = [lengths[row.id] for row in examples if lengths and row.id in lengths]
    answers = Counter(row.answer.strip() for row in examples)
    return {
        "rows": len(examples),
        "turns": spread(sum(message.role == "assistant" for message in row.messages) for row in examples),
        "characters": {
            "prompt": spread(sum(len(message.content) for message in row.prompt) for row in examples),
            "answer": spread(len(row.answer) for row in examples),
        },
        "tokens": {
            "prompt": spread(one.prompt for one in known),
            "answer": spread(one.answer for one in known),
            "total": spread(one.total for one in known),
        }
        if known
        else None,
        "answers": {
            "distinct": len(answers),
            "top": [
                {"answer": text[:200], "rows": count, "share": count / len(examples)}
                for text, count in answers.most_common(TOP)
            ],
        },
        "instruction_share": instruction_share(examples),
        "scripts": scripts(examples),
        "weights": sum(message.weight is not None for row in examples for message in row.messages),
        "tools": sum(bool(row.tools) for row in examples),
    }


def instruction_share(examples: Sequence[Example]) -> float:
    """The share of all text that is the commonest system message and what the questions share at head and tail."""
    total = sum(len(message.content) for row in examples for message in row.messages)
    if not total:
        return 0.0
    systems = Counter(message.content for row in examples for message in row.prompt if message.role == "system")
    said = sum(len(text) * count for text, count in systems.items() if count > 1)
    questions = [row.question for row in examples]
    bare = near.without_shared(questions)
    return (said + sum(len(text) - len(rest) for text, rest in zip(questions, bare, strict=True))) / total


def scripts(examples: Sequence[Example]) -> dict[str, float]:
    """Share of the letters by script (Latin, Han, Cyrillic ...), those of at least 1 %, largest first."""
    counts: Counter[str] = Counter()
    for row in examples:
        counts.update(f"{row.question[:SAMPLE]}{row.answer[:SAMPLE]}")
    letters: Counter[str] = Counter()
    for character, count in counts.items():
        if character.isalpha():
            name = unicodedata.name(character, "UNKNOWN").split()[0].title()
            letters["Han" if name == "Cjk" else name] += count
    total = sum(letters.values())
    return {name: round(count / total, 4) for name, count in letters.most_common() if count >= 0.01 * total}


def groups(examples: Sequence[Example], key: Any) -> list[list[Example]]:
    """Rows with an equal key, those of two or more, largest first."""
    found: dict[Hashable, list[Example]] = defaultdict(list)
    for row in examples:
        found[key(row)].append(row)
    return sorted((rows for rows in found.values() if len(rows) > 1), key=len, reverse=True)


def asked(row: Example) -> Hashable:
    """Equal for rows that ask the same, the system's words included."""
    return tuple((message.role, near.normal(message.content)) for message in row.prompt)


def said(row: Example) -> Hashable:
    """Equal for rows that ask and answer the same."""
    return asked(row), near.normal(row.answer)


def near_groups(examples: Sequence[Example], threshold: float = near.THRESHOLD) -> list[list[Example]]:
    """Clusters of rows whose questions are near and not all equal, largest first."""
    found: dict[int, list[Example]] = defaultdict(list)
    for row, label in zip(examples, near.clusters(near.questions(examples), threshold), strict=True):
        found[label].append(row)
    mixed = (rows for rows in found.values() if len({asked(row) for row in rows}) > 1)
    return sorted(mixed, key=len, reverse=True)


def templates_inside(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Rows whose text carries the marks of a prompt template already, by the marks."""
    found = {name: [row for row in examples if _marked(row, pattern)] for name, pattern in MARKS.items()}
    return {name: rows for name, rows in found.items() if rows}


def _marked(row: Example, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(message.content) for message in row.messages if message.role != "system")
