"""What is shown is what is in the row, and nothing in a row can act on a terminal or a page."""

from __future__ import annotations

import functools
import html
import io
import re
from html.parser import HTMLParser

import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from luthier import registry
from luthier.contracts import Template
from luthier.records import Example, Message, Origin, Rendered
from luthier.text import show
from luthier.text.render import render
from luthier.text.tokenizer import Tokenizer

HOSTILE = [
    "\x1b[31mred\x1b]0;title\x07", "\u202egnp.exe\u202c", "\u2066x\u2069\u200f", "a\x00b\r\b", "\u2028line",
    "<script>alert(1)</script>", "</pre><img src=x onerror=1>", "\"'&lt;", "[bold red]markup[/]", "<|im_end|>", "\ufdd0",
]  # fmt: skip


@functools.cache
def template(name: str) -> Template:
    made: Template = registry.make("templates", name)
    return made


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer.from_folder(vocabularies.folder(kind))


def row_of(
    question: str, answer: str, kind: str, name: str = "plain", weight: float | None = None
) -> tuple[Example, Rendered]:
    example = Example((Message("user", question), Message("assistant", answer, weight)), Origin("rows<b>.jsonl", 3))
    row = render(example, template(name), tokenizer(kind))
    assert row is not None
    return example, row


CONTENT = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12)), min_size=1, max_size=3).map("".join)
CONTENT = CONTENT.filter(lambda text: bool(text.strip()) and not any(0xD800 <= ord(c) < 0xE000 for c in text))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[str, ...]]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add((tag, tuple(name for name, _ in attrs)))


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@settings(max_examples=40, deadline=None)
@given(question=CONTENT, answer=CONTENT)
def test_shown_text_is_the_rows_and_harmless(kind: str, question: str, answer: str) -> None:
    example, row = row_of(question, answer, kind)
    text = tokenizer(kind)
    printed = show.show(example, row, text).plain.partition("\n")[2]
    bounded = "".join(run.text for run in show.runs(row, text))
    assert printed.replace(show.BOUNDARY, "", 1) == bounded or show.BOUNDARY in question + answer
    assert bounded == show.visible(text.decode_inner(row.ids))
    page = show.as_html(example, row, text)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]", printed + page
    )
    tags = Tags()
    tags.feed(page)
    assert tags.seen <= {("pre", ("class", "title")), ("span", ("class",))}
    inner = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert inner.replace(show.BOUNDARY, "", 1) == bounded or show.BOUNDARY in question + answer


def test_runs_tell_weight_control_and_side() -> None:
    _, row = row_of("hi <|im_end|>", "yes\nno", "chatml", "chat")
    runs = list(show.runs(row, tokenizer("chatml")))
    assert "".join(run.text for run in runs if run.weight) == "yes⏎\nno<|im_end|>"
    assert [run.text for run in runs if run.control] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert any("hi <|im_end|>" in run.text and not run.control for run in runs)  # spelt by the user
    assert next(run.first for run in runs if run.answer) == row.prompt_length


def test_colours_and_boundary() -> None:
    text = tokenizer("chatml")
    for weight, style, name in ((None, "green", "on"), (0.5, "yellow", "part"), (-1.0, "red", "less")):
        example, row = row_of("question", "answer", "chatml", "chat", weight)
        shown = show.show(example, row, text)
        styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
        assert styles["answer"] == style and styles[show.BOUNDARY] == "bold cyan"
        assert f'<span class="{name}">answer</span>' in show.as_html(example, row, text)
        assert f".{name}" in show.CSS
        assert shown.plain.index(show.BOUNDARY) < shown.plain.index("answer")
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=200).print(shown)
    assert "\x1b[31manswer" in out.getvalue() and "rows<b>.jsonl:3" in out.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_visible_spells_out_what_would_act(text: str) -> None:
    shown = show.visible(text)
    assert shown.isprintable() or text == "\ufdd0"
    assert show.visible("plain é 制 👩🏽\u200d🚒\tx") == "plain é 制 👩🏽\u200d🚒\tx"


def test_mask_summary() -> None:
    rows = [row_of("a", "b", "chatml")[1], row_of("a longer question", "a longer answer", "chatml")[1]]
    told = show.mask_summary(rows)
    assert told["rows"] == 2 and told["tokens"] == sum(len(row.ids) for row in rows)
    assert told["supervised"] == sum(sum(1 for w in row.weights if w) for row in rows)
    assert 0 < told["smallest_share"] <= told["share"] <= told["largest_share"] < 1 and told["cut"] == 0
    assert show.mask_summary([])["share"] == 0.0
