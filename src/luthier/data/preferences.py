"""Rows with a better and a worse answer, in the layouts of TRL, LLaMA-Factory, ms-swift, OpenAI and HH-RLHF."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.data.turns import Problems, check_text, conversation, kind, turn
from luthier.records import Message

PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
    ("response", "rejected_response"),
    ("messages", "rejected_response"),
)
PROMPTS = ("prompt", "question", "query", "instruction", "input", "conversations", "messages")
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def fields(lower: Mapping[str, str]) -> dict[str, str]:
    """Which columns hold the prompt (if any), the chosen and the rejected answer; empty where there are not both."""
    for chosen, rejected in PAIRS:
        if chosen in lower and rejected in lower:
            prompt = next((lower[name] for name in PROMPTS if name in lower and name != chosen), "")
            found = {"chosen": lower[chosen], "rejected": lower[rejected]}
            found |= {"prompt": prompt} if prompt else {}
            return found | ({"system": lower["system"]} if "system" in lower else {})
    return {}


def read(
    row: Mapping[str, Any], fields: Mapping[str, str], problems: Problems
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The conversation with the chosen answer, and the rejected turns after the shared prompt."""
    asked = _side(row, fields["prompt"], "user", problems) if "prompt" in fields else ()
    chosen = _side(row, fields["chosen"], "assistant", problems)
    rejected = _side(row, fields["rejected"], "assistant", problems)
    if "prompt" not in fields and not problems:  # the prompt is what both begin with
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if not shared and fields["chosen"] != "messages":
            problems.add("chosen and rejected share no prompt", "add a column 'prompt'")
        asked, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not problems and (not turns or turns[-1].role != "assistant"):
            problems.add(f"'{fields[name]}' does not end in an answer", "end it with the assistant's turn")
    return (*asked, *chosen), rejected


def _side(row: Mapping[str, Any], column: str, role: str, problems: Problems) -> tuple[Message, ...]:
    """One side: a text, a transcript with speakers, a turn, or a list of turns."""
    value = row.get(column)
    if isinstance(value, Mapping) and "messages" in value:  # OpenAI's input
        value = value["messages"]
    if isinstance(value, list):
        return conversation(value, column, problems)
    if isinstance(value, Mapping):
        return tuple(turn(value, column, problems))
    if not isinstance(value, str):
        problems.add(f"'{column}' must be a text or a list of turns, not {kind(value)}")
        return ()
    check_text(value, f"'{column}'", problems)
    if SPEAKER.match(value):
        _, *parts = SPEAKER.split(value)
        speakers, texts = parts[::2], parts[1::2]
        roles = ["user" if speaker == "Human" else "assistant" for speaker in speakers]
        return tuple(Message(role, text.strip()) for role, text in zip(roles, texts, strict=True))
    return (Message(role, value),)
