"""Chat: the tokenizer's own chat template, as the model was taught to talk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.contracts import Piece, TextTools
from luthier.errors import SpecError
from luthier.records import Message
from luthier.text import sandbox
from luthier.text.dialogue import Dialogue


class Options(contracts.Options):
    """Chat's settings."""

    enable_thinking: bool | None = Field(None, description="passed to templates that know it (Qwen3, SmolLM3)")
    today: date = Field(
        sandbox.TODAY, description="the date that templates print (Llama 3.x); fixed, so that prompts do not change"
    )


class Chat(contracts.Template):
    """Answers are found by prefix difference: what the template adds to a prompt once the answer is there."""

    Options = Options

    def prompt(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render with `add_generation_prompt`."""
        return self._dialogue(text).prompt(messages, given)

    def pieces(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render a conversation that ends in an answer."""
        return self._dialogue(text).pieces(messages, given)

    def source(self, text: TextTools) -> str:
        """The chat template itself."""
        return self._dialogue(text).source

    def _dialogue(self, text: TextTools) -> Dialogue:
        if not text.chat_template:
            raise SpecError(
                "this model's tokenizer has no chat template",
                where="template",
                remedy="write `template: plain`, or take the model's instruct version",
            )
        thinking = self.options.enable_thinking
        variables = {} if thinking is None else {"enable_thinking": thinking}
        remedy = (
            "set `template: {name: chat, enable_thinking: ...}` the other way, use `template: plain`, or a .jinja file"
        )
        return Dialogue(text.chat_template, text, variables, today=self.options.today, remedy=remedy)
