"""Show a row as the model sees it, and what a template adds or leaves out. Control characters are spelt out."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from luthier.contracts import Template
from luthier.errors import DataError
from luthier.records import Example, Message, Rendered
from luthier.text import marks
from luthier.text.render import shielded
from luthier.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

BOUNDARY = "‖"  # stands between the prompt and the last answer
NEWLINE = "⏎"
_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # joiners shape emoji and Persian
CSS = (
    "pre.row{white-space:pre-wrap;overflow-wrap:anywhere}pre.row .off{color:#888}"
    "pre.row .on{background:#cdeccd;color:#063}pre.row .part{background:#fdf0c0}pre.row .less{background:#f6c9c9}"
    "pre.row .control{font-weight:bold}pre.row .boundary{color:#05a;font-weight:bold}"
)


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one weight; `control`: a special token. `text` is safe to print."""

    text: str
    weight: float
    control: bool
    answer: bool  # at or after the boundary
    first: int  # index of its first token


def runs(rendered: Rendered, tokenizer: Tokenizer) -> Iterator[Run]:
    """Split a row where the weight changes, at control tokens, and between prompt and answer."""

    def key(index: int) -> tuple[Any, ...]:
        number = rendered.ids[index]
        control = number in tokenizer.special_ids
        return rendered.weights[index], control, index >= rendered.prompt_length, index if control else -1

    for (weight, control, answer, _), group in groupby(range(len(rendered.ids)), key):
        indices = list(group)
        ids = [rendered.ids[index] for index in indices]
        text = tokenizer.token(ids[0]) if control else tokenizer.decode_inner(ids)
        yield Run(visible(text), weight, control, answer, indices[0])


def visible(text: str) -> str:
    """Spell out what a terminal or a page would act on: control, bidi and other format characters; mark newlines."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character == "\n":
        return NEWLINE + "\n"
    if character in _KEPT or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def show(example: Example, rendered: Rendered, tokenizer: Tokenizer) -> Text:
    """A row in colour: dim is read, green is learnt, magenta are control tokens; headed by its origin."""
    from rich.text import Text

    text = Text()
    text.append(f"{visible(str(example.origin))}  {_facts(rendered)}\n", "bold")
    bounded = False
    for run in runs(rendered, tokenizer):
        if run.answer and not bounded:
            text.append(BOUNDARY, "bold cyan")
            bounded = True
        style = {"off": "dim", "on": "green", "part": "yellow", "less": "red"}[_kind(run.weight)]
        text.append(
            run.text,
            f"{style} bold magenta" if run.control and not run.weight else f"{style} bold" if run.control else style,
        )
    return text


def as_html(example: Example, rendered: Rendered, tokenizer: Tokenizer) -> str:
    """The same as a `<pre>` for the classes of `CSS`; every text is escaped."""
    parts = [f'<pre class="row" title="{html.escape(str(example.origin), quote=True)}">']
    bounded = False
    for run in runs(rendered, tokenizer):
        if run.answer and not bounded:
            parts.append(f'<span class="boundary">{BOUNDARY}</span>')
            bounded = True
        control = " control" if run.control else ""
        parts.append(f'<span class="{_kind(run.weight)}{control}">{html.escape(run.text)}</span>')
    return "".join([*parts, "</pre>"])


def mask_summary(rendered: Sequence[Rendered]) -> dict[str, float]:
    """How much of some rows is learnt: rows, tokens, supervised tokens, shares, longest row, rows cut."""
    tokens = sum(len(row.ids) for row in rendered)
    supervised = sum(row.supervised for row in rendered)
    shares = [row.supervised / len(row.ids) for row in rendered]
    return {
        "rows": len(rendered),
        "tokens": tokens,
        "supervised": supervised,
        "share": supervised / tokens if tokens else 0.0,
        "smallest_share": min(shares, default=0.0),
        "largest_share": max(shares, default=0.0),
        "longest": max((len(row.ids) for row in rendered), default=0),
        "cut": sum(1 for row in rendered if row.cut),
    }


def hidden_system(template: Template, tokenizer: Tokenizer) -> str | None:
    """The text that a template puts before a conversation without a system message; None if it adds none.

    Found by comparing what stands before a first user turn and before a later one.
    """
    first, answer, later = "first-probe", "answer-probe", "later-probe"
    head = _said(template.prompt([Message("user", first)], [], tokenizer)).partition(first)[0]
    turns = [Message("user", first), Message("assistant", answer), Message("user", later)]
    try:
        between = _said(template.prompt(turns, [], tokenizer)).partition(answer)[2].partition(later)[0]
    except DataError:  # a template for one turn only
        between = ""
    for special in sorted(tokenizer.specials, key=len, reverse=True):
        head, between = head.replace(special, ""), between.replace(special, "")
    added = head[: len(head) - _common_suffix(head, between)]
    return added.strip().removeprefix("system\n").strip() or None


def discarded(example: Example, template: Template, tokenizer: Tokenizer) -> list[str]:
    """What of a row the template does not show: lines of text, extra fields such as tool calls, tools."""
    text = _conversation(example, template, tokenizer)
    lost = []
    for index, message in enumerate(example.messages):
        place = f"message {index + 1} ({message.role})"
        missing = [line.strip() for line in message.content.splitlines() if line.strip() and line.strip() not in text]
        lost += [f"{place}: {visible(line)}" for line in missing]
        for key, value in message.extra.items():
            changed = replace(message, extra={**message.extra, key: _changed(value)})
            other = replace(example, messages=(*example.messages[:index], changed, *example.messages[index + 1 :]))
            if value not in (None, "", [], {}) and _same(text, other, template, tokenizer):
                lost.append(f"{place}: the field '{key}'")
    if example.tools and _same(text, replace(example, tools=()), template, tokenizer):
        lost.append("the tools")
    return lost


def _conversation(example: Example, template: Template, tokenizer: Tokenizer) -> str:
    return marks.unmark(_said(template.pieces(shielded(example.messages, tokenizer), list(example.tools), tokenizer)))


def _same(text: str, other: Example, template: Template, tokenizer: Tokenizer) -> bool:
    try:
        return _conversation(other, template, tokenizer) == text
    except DataError:
        return False  # it made a difference


def _changed(value: Any) -> Any:
    if isinstance(value, str):
        return f"{value} changed"
    if isinstance(value, dict):
        return {key: _changed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(item) for item in value]
    return "changed"


def _said(pieces: Sequence[Any]) -> str:
    return "".join(piece.text for piece in pieces)


def _common_suffix(left: str, right: str) -> int:
    size = 0
    while size < min(len(left), len(right)) and left[-1 - size] == right[-1 - size]:
        size += 1
    return size


def _kind(weight: float) -> str:
    return "off" if weight == 0 else "less" if weight < 0 else "on" if weight >= 1 else "part"


def _facts(rendered: Rendered) -> str:
    cut = f", {rendered.cut} cut" if rendered.cut else ""
    return (
        f"{len(rendered.ids)} tokens, {rendered.supervised} learnt ({rendered.supervised / len(rendered.ids):.0%}){cut}"
    )
