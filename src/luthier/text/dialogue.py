"""Cut a rendered conversation into prompts and answers: by prefix difference for Jinja, by hand for plain text.

A prompt's pieces are, by construction, the first pieces of its row: `row = prompt(messages[:-1]) + [answer]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any

from luthier.contracts import Piece, TextTools
from luthier.errors import DataError, LuthierError, SpecError
from luthier.records import Message
from luthier.text import marks, sandbox, tools

Tools = Sequence[Mapping[str, Any]]
_PROBE = (Message("user", "probe"), Message("assistant", "reply"))
_ANSWER = "\ufdd3answer\ufdd3"  # noncharacters: no template and no person writes them


def written(
    messages: Sequence[Message],
    text: TextTools,
    *,
    heading: Callable[[int, Message], str],
    cue: str,
    opening: str = "",
    between: str = "",
) -> list[Piece]:
    """Pieces of a prompt in a plain-text format: `heading` writes a turn, `cue` asks for an answer.

    Answers end with the model's own end token; `between` parts an answer from the next turn.
    """
    pieces, told = [], opening
    for index, message in enumerate(messages):
        if message.role == "assistant":
            pieces += [Piece(told + cue), Piece(ended(tools.spoken(message), text), index)]
            told = between
        else:
            told += heading(index, message)
    return [*pieces, Piece(told + cue)]


def ended(answer: str, text: TextTools) -> str:
    """An answer with the end token that stops generation."""
    return answer + text.ends[0]


@dataclass(frozen=True)
class Dialogue:
    """A Jinja chat template with a tokenizer's names; `remedy` says what to do where it cannot be used."""

    source: str
    text: TextTools
    variables: Mapping[str, Any] = field(default_factory=dict)
    name: str = "chat template"
    today: date = sandbox.TODAY
    remedy: str = "use `template: plain`, or write a .jinja template of your own"

    def prompt(self, messages: Sequence[Message], given: Tools) -> list[Piece]:
        """Pieces up to where the model speaks. Earlier answers are pieces of their own, each with its end token.

        A template that rewrites an earlier answer (Qwen3 drops its thinking) leaves it inside the prompt's text.
        """
        return self._parted(self.asked(messages, given), messages, given)

    def _parted(self, whole: str, messages: Sequence[Message], given: Tools) -> list[Piece]:
        pieces, at = [], 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.asked(messages[:index], given)
            answer = self.answered(messages[: index + 1], given, before)
            after = len(before) + len(answer or "")
            if not answer or not whole.startswith(before + answer) or len(before) < at:
                continue
            if not self._ends(answer):  # GLM ends an answer with the next turn's mark
                mark = next((end for end in self.text.ends if whole.startswith(end, after)), None)
                if mark is None:
                    continue
                answer, after = answer + mark, after + len(mark)
            pieces += [Piece(whole[at : len(before)]), Piece(answer, index)]
            at = after
        return [piece for piece in (*pieces, Piece(whole[at:])) if piece.text]

    def pieces(self, messages: Sequence[Message], given: Tools) -> list[Piece]:
        """Pieces of a conversation that ends in an answer; raise DataError where the template mends the answer."""
        asked = self.asked(messages[:-1], given)
        answer = self.answered(messages, given, asked)
        if answer is None:
            raise DataError(
                f"the {self.name} writes something else before an answer ({_tail(asked)}) when it is asked for one",
                remedy=self.remedy,
            )
        if not self._ends(answer):
            answer += self.text.ends[0]
        return [*self._parted(asked, messages[:-1], given), Piece(answer, len(messages) - 1)]

    def asked(self, messages: Sequence[Message], given: Tools) -> str:
        """The text that generation starts from."""
        if _cues(self.source, self.text.bos, self.text.eos, _frozen(self.variables), self.name, self.today):
            return self.render(messages, given, cue=True)
        said = self.render([*messages, Message("assistant", _ANSWER)], given, cue=False)
        if _ANSWER not in said:
            raise SpecError(f"the {self.name} drops the answer", remedy=self.remedy)
        return said[: said.index(_ANSWER)]

    def answered(self, messages: Sequence[Message], given: Tools, asked: str) -> str | None:
        """What follows `asked` in the finished text, up to and with its first end token; None if it does not follow."""
        full = self.render(messages, given, cue=False)
        if not full.startswith(asked):
            return None
        answer = full[len(asked) :]
        end = marks.find(answer, self.text.ends)
        return answer[: end[1]] if end else answer.rstrip("\n")

    def render(self, messages: Sequence[Message], given: Tools, *, cue: bool) -> str:
        """The template's whole text for some messages."""
        variables = {
            "bos_token": self.text.bos,
            "eos_token": self.text.eos,
            **self.variables,
            "messages": [tools.as_dict(message) for message in messages],
            "tools": tools.schemas(given),
            "documents": None,
            "add_generation_prompt": cue,
        }
        return sandbox.render(self.source, variables, name=self.name, today=self.today)

    def _ends(self, answer: str) -> bool:
        return answer.endswith(tuple(self.text.ends))


def _frozen(variables: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(variables.items()))


@lru_cache(64)
def _cues(source: str, bos: str, eos: str, variables: tuple[tuple[str, Any], ...], name: str, today: date) -> bool:
    """Whether a template knows `add_generation_prompt`; if not, the header before an answer is found by a probe."""
    told = {"bos_token": bos, "eos_token": eos, **dict(variables), "tools": None, "documents": None}
    for messages in (_PROBE[:1], (Message("system", "probe"), *_PROBE[:1])):
        try:
            dicts = [tools.as_dict(message) for message in messages]
            with_cue, without = (
                sandbox.render(
                    source, {**told, "messages": dicts, "add_generation_prompt": cue}, name=name, today=today
                )
                for cue in (True, False)
            )
        except LuthierError as error:
            if isinstance(error, SpecError):
                raise
            continue
        return with_cue != without
    return True


def _tail(text: str, width: int = 40) -> str:
    return repr(text[-width:])
