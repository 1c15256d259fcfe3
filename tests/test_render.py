"""Ids and weights: what is learnt, what is refused, and what an allowed truncation takes away."""

from __future__ import annotations

import functools

import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import registry
from luthier.contracts import Piece, Template
from luthier.errors import DataError, SpecError
from luthier.records import Example, Message, Origin, Rendered
from luthier.text.render import render, render_all, render_prompt
from luthier.text.tokenizer import Tokenizer


@functools.cache
def template(name: str = "chat") -> Template:
    made: Template = registry.make("templates", name)
    return made


@functools.cache
def tokenizer(kind: str = "chatml") -> Tokenizer:
    return Tokenizer.from_folder(vocabularies.folder(kind))


def user(text: str) -> Message:
    return Message("user", text)


def says(text: str, weight: float | None = None) -> Message:
    return Message("assistant", text, weight)


def of(*messages: Message, line: int = 7) -> Example:
    return Example(tuple(messages), Origin("rows.jsonl", line))


def whole(example: Example, name: str = "chat", kind: str = "chatml") -> Rendered:
    row = render(example, template(name), tokenizer(kind))
    assert row is not None
    return row


def by_weight(row: Rendered, weight: float) -> str:
    return tokenizer().decode([n for n, w in zip(row.ids, row.weights, strict=True) if w == weight], skip_special=False)


def test_weights_of_messages() -> None:
    row = whole(of(user("a"), says("first", 0.5), user("b"), says("second", 0.0), user("c"), says("third")))
    assert by_weight(row, 0.5) == "first<|im_end|>"
    assert by_weight(row, 1.0) == "third<|im_end|>"
    assert "second" in by_weight(row, 0.0)
    negative = whole(of(user("a"), says("bad", -0.7)))
    assert by_weight(negative, -0.7) == "bad<|im_end|>" and negative.supervised > 1


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@pytest.mark.parametrize("name", ["plain", "raw"])
@settings(max_examples=20, deadline=None)
@given(
    text=st.text(min_size=1, max_size=30).filter(
        lambda t: bool(t.strip()) and not any(0xD800 <= ord(c) < 0xE000 for c in t)
    )
)
def test_a_text_row_is_learnt_whole(name: str, kind: str, text: str) -> None:
    row, tools = whole(of(says(text)), name, kind), tokenizer(kind)
    assert row.ids[-1] in tools.stop_ids
    assert row.weights == (0.0, *[1.0] * (len(row.ids) - 1))
    assert row.ids[: row.prompt_length] == render_prompt((), (), template(name), tools)
    assert row.prompt_length == (1 if tools.start else 0)


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        ([user("a")], "does not end in an answer"),
        ([], "does not end in an answer"),
        ([user("a"), says(" \n")], "message 2 is an empty answer"),
        ([user("a"), says(""), user("b"), says("c")], "message 2 is an empty answer"),
        ([user("a"), says("b", 0.0)], "every answer has weight 0"),
        ([Message("user", "a", 1.0), says("b")], "only answers are trained"),
    ],
)
def test_nothing_to_learn_names_row_and_cause(messages: list[Message], cause: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:7: .*{cause}"):
        render(of(*messages), template(), tokenizer())


def test_all_faults_at_once() -> None:
    rows = [of(user("a"), line=1), of(user("a"), says("fine"), line=2), of(user("a"), says(""), line=3)]
    rows.append(of(user("long " * 90), says("b"), line=4))
    with pytest.raises(DataError) as caught:
        render_all(rows, template(), tokenizer(), 64)
    assert [fault.where for fault in caught.value.faults] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    assert "tokens, the limit is 64" in str(caught.value) and "data.truncate" in str(caught.value)
    done = render_all(rows[1:2], template(), tokenizer(), 64)
    assert len(done.rendered) == 1 and not (done.dropped or done.cut or done.notes)


def test_dropped_rows_are_listed() -> None:
    short, long = of(user("a"), says("b"), line=1), of(user("long " * 90), says("b"), line=2)
    assert render(long, template(), tokenizer(), max_length=64, truncate="drop") is None
    done = render_all([short, long], template(), tokenizer(), 64, "drop")
    assert done.dropped == [long] and [row.example_id for row in done.rendered] == [short.id]


def test_rewritten_answers_are_said_or_refused() -> None:
    turns = [user("a"), says("first"), user("b"), says("second")]
    done = render_all([of(*turns), of(*turns)], template(), tokenizer("qwen3"))
    assert list(done.notes.values()) == [2] and "rewrites earlier answers" in next(iter(done.notes))
    with pytest.raises(DataError, match="one row per answer"):
        render(of(user("a"), says("first", 1.0), *turns[2:]), template(), tokenizer("qwen3"))
    assert not render_all([of(*turns)], template(), tokenizer()).notes


WORDS = st.lists(
    st.sampled_from(["where", "is", "the", "Bern", "é", "制琴", "\n", "<|im_end|>", "👩🏽\u200d🚒"]),
    min_size=1,
    max_size=40,
)
TEXT = WORDS.map(" ".join).filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize(
    ("name", "kind"), [("chat", "chatml"), ("chat", "llama2"), ("chat", "gemma"), ("plain", "neox"), ("raw", "llama3")]
)
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=st.none() | TEXT, limit=st.integers(8, 120)
)
def test_truncation_laws(
    name: str, kind: str, side: str, turns: list[tuple[str, str]], system: str | None, limit: int
) -> None:
    head = [Message("system", system)] if system else []
    example = of(*head, *(message for question, answer in turns for message in (user(question), says(answer))))
    uncut, made, tools = whole(example, name, kind), template(name), tokenizer(kind)
    try:
        done = render_all([example], made, tools, limit, side)
    except DataError as error:
        assert len(uncut.ids) > limit and "the limit is" in str(error)
        return
    row = done.rendered[0]
    assert len(row.ids) <= limit and row.example_id == example.id
    assert 0 < row.supervised < len(row.ids)
    if len(uncut.ids) <= limit:
        assert row == uncut and not done.cut
        return
    [(cut, tokens, where)] = done.cut
    assert cut is example and tokens == row.cut == len(uncut.ids) - len(row.ids)
    answer = uncut.ids[uncut.prompt_length :]
    if where == "the end of the answer":
        assert side == "right" and row.ids == uncut.ids[:limit] and row.ids[-1] not in tools.stop_ids
        return
    assert row.ids[row.prompt_length :] == answer  # the answer is whole
    kept = tools.decode(row.ids)
    assert all(word in kept for word in (system or "").split())  # the system message is never cut


def test_what_each_side_takes() -> None:
    turns = [
        user("old question"),
        says("old answer"),
        user("one two three four five six seven eight nine ten"),
        says("yes"),
    ]
    example = of(Message("system", "Be brief."), *turns)
    full = len(whole(example).ids)

    def shown(side: str, limit: int, row: Example = example) -> tuple[str, str]:
        done = render_all([row], template(), tokenizer(), limit, side)
        return tokenizer().decode(done.rendered[0].ids), done.cut[0][2]

    text, where = shown("left", full - 1)
    assert where == "the oldest turns" and "old" not in text and "one two" in text and "Be brief." in text
    text, where = shown("left", len(whole(of(example.messages[0], *turns[2:])).ids) - 4)
    assert (
        where == "the oldest turns and the start of the question"
        and text.endswith("ten\nassistant\nyes")
        and "one" not in text
    )
    last = of(Message("system", "Be brief."), *turns[2:])
    text, where = shown("right", len(whole(last).ids) - 12, last)
    assert where == "the end of the question" and "one two" in text and "ten" not in text and "yes" in text
    long = of(user("a b c"), says("one two three four five six seven eight"))
    text, where = shown("right", len(whole(long).ids) - 9, long)
    assert where == "the end of the answer" and "a b c" in text and "one two" in text and "eight" not in text
    with pytest.raises(DataError, match="the answer cannot be cut"):
        shown("left", len(whole(long).ids) - 9, long)
    with pytest.raises(DataError, match="the template's and the system's text cannot be cut"):
        shown("left", 20, last)


def test_text_rows_are_cut_at_the_asked_side() -> None:
    example = of(says("one two three four five six"))
    size = len(whole(example).ids)
    for side, kept in (("left", "six<|im_end|>"), ("right", "one")):
        row = render(example, template(), tokenizer(), max_length=size - 4, truncate=side)
        assert row is not None and row.cut >= 4
        text = tokenizer().decode(row.ids, skip_special=False)
        assert kept in text and len(row.ids) <= size - 4


class Endless(Template):
    def pieces(self, messages, tools, text):  # type: ignore[no-untyped-def]
        return [Piece("q"), Piece(messages[-1].content, len(messages) - 1)]

    def prompt(self, messages, tools, text):  # type: ignore[no-untyped-def]
        return [Piece("q")]


def test_a_plug_in_template_without_an_end_is_refused() -> None:
    with pytest.raises(SpecError, match="does not end an answer"):
        render(of(user("a"), says("b")), Endless(), tokenizer())
