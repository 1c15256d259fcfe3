"""Alpaca: the format of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), word for word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier import contracts
from luthier.contracts import Piece, TextTools
from luthier.records import Message
from luthier.text import dialogue, tools

BARE = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
INSTRUCTION, INPUT, CUE = "### Instruction:\n", "### Input:\n", "### Response:"


class Alpaca(contracts.Template):
    """With a system message, that is the instruction and each user turn an input; else user turns are instructions."""

    def prompt(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render the preamble, the turns and the response's heading. Tools are listed before the first turn."""
        instructed = any(message.role == "system" for message in messages)
        opening = text.start + (WITH_INPUT if instructed else BARE)
        if given:
            opening += f"### Tools:\n{tools.listing(given)}\n\n"
        headings = {"system": INSTRUCTION, "user": INPUT if instructed else INSTRUCTION}

        def turn(_: int, message: Message) -> str:
            return f"{headings.get(message.role, INPUT)}{message.content}\n\n"

        return dialogue.written(messages, text, heading=turn, cue=CUE, opening=opening, between="\n\n")

    def pieces(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render a conversation that ends in an answer."""
        answer = dialogue.ended(tools.spoken(messages[-1]), text)
        return [*self.prompt(messages[:-1], given, text), Piece(answer, len(messages) - 1)]
