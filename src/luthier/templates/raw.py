"""Raw: nothing but BOS, where the tokenizer writes one, and the end token; for data with a template of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.contracts import Piece, TextTools
from luthier.records import Message
from luthier.text import dialogue, marks, tools


class Options(contracts.Options):
    """Raw's settings."""

    separator: str = Field("", description="text after each message that is not an answer, such as a newline")
    control_tokens: bool = Field(
        False, description="let control tokens spelt in the data be control tokens: only for data you trust"
    )


class Raw(contracts.Template):
    """Messages follow one another as they are."""

    Options = Options

    def prompt(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Join the turns' texts. Tools are not shown."""
        messages = [self._freed(message) for message in messages]
        carried = bool(text.start) and bool(messages) and messages[0].content.startswith(text.start)
        opening = "" if carried else text.start
        pieces = dialogue.written(messages, text, heading=self._turn, cue="", opening=opening)
        return [piece for piece in pieces if piece.text]

    def pieces(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Join the turns' texts and end the answer, unless the data has ended it."""
        answer = tools.spoken(self._freed(messages[-1]))
        for end in text.ends:
            answer = answer.removesuffix(end) if self.options.control_tokens else answer
        return [*self.prompt(messages[:-1], given, text), Piece(dialogue.ended(answer, text), len(messages) - 1)]

    def _turn(self, _: int, message: Message) -> str:
        return f"{message.content}{self.options.separator}"

    def _freed(self, message: Message) -> Message:
        if not self.options.control_tokens:
            return message
        return Message(message.role, marks.unmark(message.content), message.weight, message.extra)
