"""Plain: `### Question:` and `### Answer:`; for models without a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier import contracts
from luthier.contracts import Piece, TextTools
from luthier.records import Message
from luthier.text import dialogue, tools

HEADINGS = {"user": "### Question:\n", "system": "", "tool": "### Tool result:\n"}
CUE = "### Answer:\n"


class Plain(contracts.Template):
    """System text stands above the first question; each answer ends with the model's end token."""

    def prompt(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render the turns and the heading of the answer."""
        opening = text.start + (f"### Tools:\n{tools.listing(given)}\n\n" if given else "")
        return dialogue.written(messages, text, heading=_turn, cue=CUE, opening=opening, between="\n\n")

    def pieces(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render a conversation that ends in an answer."""
        answer = dialogue.ended(tools.spoken(messages[-1]), text)
        return [*self.prompt(messages[:-1], given, text), Piece(answer, len(messages) - 1)]


def _turn(_: int, message: Message) -> str:
    return f"{HEADINGS.get(message.role, f'### {message.role.capitalize()}:' + chr(10))}{message.content}\n\n"
