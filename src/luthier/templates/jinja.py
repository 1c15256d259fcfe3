"""Jinja: a chat template of the user's own, in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.contracts import Piece, TextTools
from luthier.errors import SpecError
from luthier.records import Message
from luthier.text import sandbox
from luthier.text.dialogue import Dialogue


class Options(contracts.Options):
    """Jinja's settings."""

    path: str = Field(description="the .jinja file, relative to the YAML")
    today: date = Field(
        sandbox.TODAY, description="the date that `strftime_now` gives; fixed, so prompts do not change"
    )


class Jinja(contracts.Template):
    """The template gets `messages`, `add_generation_prompt`, `bos_token`, `eos_token` and `tools`, in the sandbox."""

    Options = Options

    def prompt(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render with `add_generation_prompt`."""
        return self._dialogue(text).prompt(messages, given)

    def pieces(self, messages: Sequence[Message], given: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render a conversation that ends in an answer."""
        return self._dialogue(text).pieces(messages, given)

    def source(self, text: TextTools) -> str:
        """The file's text."""
        return self._written

    @cached_property
    def _written(self) -> str:
        try:
            source = Path(self.options.path).read_text("utf-8-sig")
        except FileNotFoundError:
            raise SpecError(
                "there is no such template", where=self.options.path, remedy="mend `template.path`"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"cannot be read as UTF-8 text ({error})", where=self.options.path) from None
        sandbox.check(source, self.options.path)
        return source

    def _dialogue(self, text: TextTools) -> Dialogue:
        name, remedy = self.options.path, "write its generation prompt just as it begins a finished answer"
        return Dialogue(self._written, text, name=name, today=self.options.today, remedy=remedy)
