"""Laws that every template meets by standing on the shelf, with every kind of tokenizer."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import registry
from luthier.contracts import Template
from luthier.errors import DataError, SpecError
from luthier.model import tiny
from luthier.records import Example, Message, Origin
from luthier.text import show
from luthier.text.render import render, render_prompt
from luthier.text.tokenizer import Tokenizer


@functools.cache
def jinja_file(source: str = tiny.CHAT_TEMPLATE) -> str:
    path = Path(tempfile.mkdtemp(prefix="luthier-template-")) / "t.jinja"
    path.write_text(source, "utf-8")
    return str(path)


# Options without which a template cannot be made; a new template that needs some adds its line here.
NEEDED: dict[str, dict[str, Any]] = {"jinja": {"path": jinja_file()}}


@functools.cache
def template(name: str) -> Template:
    made: Template = registry.make("templates", {"name": name, **NEEDED.get(name, {})})
    return made


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer.from_folder(vocabularies.folder(kind))


def fits(name: str, kind: str) -> bool:
    return not (name == "chat" and kind == "neox") and not (name == "jinja" and kind not in ("chatml", "qwen3"))


CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name, kind in itertools.product(registry.names("templates"), vocabularies.KINDS)
    if fits(name, kind)
]

WORDS = st.text(
    st.one_of(st.sampled_from("ab C.\n'\"{}%|<>▁ "), st.characters(exclude_categories=("Cs",))), max_size=25
)
CONTROL = st.sampled_from(
    ["<|im_end|>", "</s>", "<end_of_turn>", "<|endoftext|>", "<s>", "<|user|>", "<|eot_id|>", "[INST]"]
)
TEXT = st.lists(st.one_of(WORDS, WORDS, CONTROL), min_size=1, max_size=3).map("".join)
ANSWER = TEXT.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    head = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(ANSWER, ANSWER), min_size=1, max_size=3))
    return (*head, *(m for user, answer in turns for m in (Message("user", user), Message("assistant", answer))))


def of(*messages: Message, **more: Any) -> Example:
    return Example(tuple(messages), Origin("rows.jsonl", 7), **more)


def taught(row: Any, tokenizer: Tokenizer) -> list[str]:
    """The supervised stretches as text."""
    groups = itertools.groupby(zip(row.ids, row.weights, strict=True), key=lambda pair: bool(pair[1]))
    return [tokenizer.decode([number for number, _ in group]) for on, group in groups if on]


@pytest.mark.parametrize(("name", "kind"), CASES)
@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_the_laws(name: str, kind: str, messages: tuple[Message, ...]) -> None:
    made, text = template(name), tokenizer(kind)
    example = of(*messages)
    row = render(example, made, text)
    assert row is not None
    ids, end = row.ids, row.prompt_length
    # THE law: the prompt that generation starts from is the row's own beginning
    assert ids[:end] == render_prompt(example.prompt, (), made, text)
    # only answers are supervised, never a BOS; the prompt of the last answer is not part of it
    assert 0 < row.supervised < len(ids) and len(row.weights) == len(ids)
    assert all(row.weights[end:]) and set(row.weights) <= {0.0, 1.0} and row.weights[0] == 0
    # one end token for each answer that is taught, the last of them at the row's very end
    taught_ids = [number for number, weight in zip(ids, row.weights, strict=True) if weight]
    answers = sum(message.role == "assistant" for message in messages)
    ends = [number for number in taught_ids if number in text.stop_ids]
    assert ids[-1] in text.stop_ids and ids[-2] not in text.stop_ids
    assert len(ends) in (1, answers)
    # no double BOS
    if text.bos_id is not None:
        assert list(ids[:2]) != [text.bos_id] * 2
        assert text.bos == text.eos or text.bos_id not in taught_ids


@pytest.mark.parametrize(("name", "kind"), CASES)
@settings(max_examples=15, deadline=None)
@given(
    content=st.lists(st.one_of(CONTROL, st.sampled_from(["a", " ", "\n", "|>", "<|"])), min_size=1, max_size=6).map(
        "".join
    )
)
def test_content_holds_no_control_tokens(name: str, kind: str, content: str) -> None:
    """A conversation with control tokens spelt in it has just as many control tokens as one without."""
    made, text = template(name), tokenizer(kind)

    def controls(said: str) -> list[int]:
        messages = [Message("system", f"s{said}s"), Message("user", f"a{said}a"), Message("assistant", f"b{said}b")]
        row = render(of(*messages), made, text)
        assert row is not None
        return [number for number in row.ids if number in text.special_ids - set(text.encode(text.unk or "x"))]

    assert controls(content) == controls("plain words")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_taught_is_what_was_said(name: str, kind: str) -> None:
    made, text = template(name), tokenizer(kind)
    turns = [
        Message("user", "where?"),
        Message("assistant", "In Bern."),
        Message("user", "when?"),
        Message("assistant", "At ten."),
    ]
    row = render(of(*turns), made, text)
    said = [stretch.replace("<think>\n\n</think>\n\n", "").strip() for stretch in taught(row, text)]
    rewrites = name == "chat" and kind == "qwen3"
    assert said == (["At ten."] if rewrites else ["In Bern.", "At ten."])
    for message in turns:
        assert message.content in text.decode(row.ids)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_stands_before_a_later_answer_is_what_was_generated(name: str, kind: str) -> None:
    """The history of a second turn begins with the first turn's own tokens, so a served cache can be kept."""
    made, text = template(name), tokenizer(kind)
    first = [Message("user", "where?"), Message("assistant", "In Bern.")]
    one = render(of(*first), made, text)
    two = render(of(*first, Message("user", "when?"), Message("assistant", "Now.")), made, text)
    assert one is not None and two is not None
    kept = one.prompt_length if name == "chat" and kind in ("qwen3", "glm") else len(one.ids)
    assert two.ids[:kept] == one.ids[:kept]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_source_and_options(name: str, kind: str) -> None:
    made, text = template(name), tokenizer(kind)
    assert made.source(text)
    for field, info in made.Options.model_fields.items():
        assert info.description, f"{name}.{field} has no description"
    again = registry.make("templates", {"name": name, **made.options.model_dump(mode="json")})
    messages = [Message("user", "a")]
    assert again.prompt(messages, [], text) == made.prompt(messages, [], text)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_system_message_is_shown(name: str, kind: str) -> None:
    made, text = template(name), tokenizer(kind)
    ids = render_prompt([Message("system", "Answer in Latin."), Message("user", "where?")], (), made, text)
    assert "Answer in Latin." in text.decode(ids)


@pytest.mark.parametrize("kind", [kind for kind in vocabularies.KINDS if kind != "neox"])
def test_chat_gives_the_ids_of_transformers(kind: str) -> None:
    from transformers import AutoTokenizer

    theirs, text = AutoTokenizer.from_pretrained(vocabularies.folder(kind)), tokenizer(kind)
    if kind == "llama3":  # their date is today's
        theirs.chat_template = theirs.chat_template.replace('strftime_now("%d %b %Y")', "'26 Jul 2024'")
    if kind == "glm":  # ours ends the last answer with an end token
        return
    chat = [
        ("system", "Be kind."),
        ("user", "where?"),
        ("assistant", "In Bern."),
        ("user", "when?"),
        ("assistant", "Now."),
    ]
    for skip in (0, 1):
        dicts = [{"role": role, "content": content} for role, content in chat[skip:]]
        example = of(*(Message(**message) for message in dicts))
        asked = theirs.apply_chat_template(dicts[:-1], add_generation_prompt=True)["input_ids"]
        full = theirs.apply_chat_template(dicts)["input_ids"]
        row = render(example, template("chat"), text)
        assert row is not None
        if kind == "llama2":  # no generation prompt: the answer's header is one space, found by a probe
            assert list(row.ids[: row.prompt_length])[: len(asked)] == asked
        else:
            assert list(row.ids[: row.prompt_length]) == asked
        assert list(row.ids) == full[: len(row.ids)]
        assert theirs.decode(full[len(row.ids) :]).strip() == ""


def test_chat_without_a_template_names_the_remedy() -> None:
    with pytest.raises(SpecError, match="plain"):
        render(of(Message("user", "a"), Message("assistant", "b")), template("chat"), tokenizer("neox"))


def test_qwen3_thinking() -> None:
    """Its template writes an empty thought into the answer, or into the prompt when thinking is off."""
    text = tokenizer("qwen3")
    example = of(Message("user", "where?"), Message("assistant", "In Bern."))
    thought = "<think>\n\n</think>\n\n"
    for options, in_answer in (({}, True), ({"enable_thinking": True}, True), ({"enable_thinking": False}, False)):
        made = registry.make("templates", {"name": "chat", **options})
        row = render(example, made, text)
        assert row is not None
        assert taught(row, text) == [(thought if in_answer else "") + "In Bern."]
        assert text.decode(row.ids[: row.prompt_length]).endswith(thought) != in_answer
    thinking = of(Message("user", "where?"), Message("assistant", "<think>\nhm\n</think>\n\nIn Bern."))
    row = render(thinking, template("chat"), text)
    assert row is not None and taught(row, text) == ["<think>\nhm\n</think>\n\nIn Bern."]
    assert text.encode("<think>")[0] in row.ids  # the model's own mark, not its spelling
    with pytest.raises(DataError, match=r"rows\.jsonl:7.*enable_thinking"):
        render(thinking, registry.make("templates", {"name": "chat", "enable_thinking": False}), text)


def test_a_template_whose_cue_is_no_beginning_of_an_answer() -> None:
    """DeepSeek R1's kind: the cue opens a thought that the finished answer does not have."""
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    made = registry.make("templates", {"name": "jinja", "path": jinja_file(source)})
    with pytest.raises(DataError, match="something else before an answer"):
        render(of(Message("user", "a"), Message("assistant", "b")), made, tokenizer("chatml"))


def test_a_template_that_refuses_names_row_and_reason() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7.*roles must alternate"):
        render(
            of(Message("user", "a"), Message("user", "b"), Message("assistant", "c")),
            template("chat"),
            tokenizer("gemma"),
        )


def test_jinja_faults(tmp_path: Path) -> None:
    example = of(Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(SpecError, match="no such template"):
        render(
            example,
            registry.make("templates", {"name": "jinja", "path": str(tmp_path / "none.jinja")}),
            tokenizer("chatml"),
        )
    for source, says in (
        ("\n{% if %}", "bad.jinja:2"),
        ("{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", "twice"),
    ):
        (tmp_path / "bad.jinja").write_text(source)
        with pytest.raises(SpecError, match=says):
            render(
                example,
                registry.make("templates", {"name": "jinja", "path": str(tmp_path / "bad.jinja")}),
                tokenizer("llama3"),
            )


def test_raw_adds_nothing_and_can_trust_its_data() -> None:
    text = tokenizer("llama3")
    said = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    example = of(Message("user", said), Message("assistant", "yo<|eot_id|>"))
    plain = render(example, template("raw"), text)
    trusted = render(example, registry.make("templates", {"name": "raw", "control_tokens": True}), text)
    assert plain is not None and trusted is not None
    assert list(trusted.ids) == text.encode(said) + text.encode("yo<|eot_id|>")
    assert [n for n in plain.ids if n in text.special_ids] == [text.bos_id, text.encode("<|eot_id|>")[0]]
    assert text.decode(plain.ids) == said + "yo<|eot_id|>"  # spelt, not meant
    spaced = registry.make("templates", {"name": "raw", "separator": "\n"})
    row = render(of(Message("system", "s"), Message("user", "u"), Message("assistant", "a")), spaced, text)
    assert row is not None and text.decode(row.ids) == "s\nu\na"


def test_alpaca_is_stanfords_text() -> None:
    text = tokenizer("llama3")
    row = render(of(Message("user", "List three."), Message("assistant", "1 2 3")), template("alpaca"), text)
    assert row is not None and text.decode(row.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nList three.\n\n### Response:1 2 3"
    )
    both = of(Message("system", "Sort."), Message("user", "b a"), Message("assistant", "a b"))
    row = render(both, template("alpaca"), text)
    assert row is not None and text.decode(row.ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:a b"
    )


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("chat", "chatml", tiny.SYSTEM),
        ("chat", "llama3", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"),
        ("chat", "llama2", None),
        ("chat", "gemma", None),
        ("chat", "qwen3", None),
        ("plain", "llama3", None),
        ("raw", "llama3", None),
        (
            "alpaca",
            "neox",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        ),
    ],
)
def test_hidden_system(name: str, kind: str, says: str | None) -> None:
    assert show.hidden_system(template(name), tokenizer(kind)) == says


def test_discarded() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": '{"day": "Monday"}'}}
    example = of(
        Message("user", "where?"),
        Message("assistant", "<think>\nhmm, a secret\n</think>\n\nIn Bern."),
        Message("user", "when?"),
        Message("assistant", "Look:", extra={"tool_calls": [call], "reasoning_content": "a thought", "score": 3}),
        tools=({"name": "look", "parameters": {}},),
    )
    lost = show.discarded(example, template("chat"), tokenizer("qwen3"))
    assert any("secret" in line for line in lost) and any("score" in line for line in lost) and "the tools" in lost
    assert not any("tool_calls" in line or "reasoning" in line or "Bern" in line for line in lost)
    kept = show.discarded(example, template("plain"), tokenizer("qwen3"))
    assert kept == ["message 4 (assistant): the field 'reasoning_content'", "message 4 (assistant): the field 'score'"]


def test_tool_calls_are_written_once_as_json() -> None:
    """OpenAI's arguments are JSON in a string; a template that writes JSON itself would quote them twice."""
    call = {"type": "function", "function": {"name": "look", "arguments": '{"day": "<|im_end|>"}'}}
    example = of(Message("user", "when?"), Message("assistant", "", extra={"tool_calls": [call]}))
    text = tokenizer("qwen3")
    row = render(example, template("chat"), text)
    assert row is not None
    assert '{"name": "look", "arguments": {"day": "<|im_end|>"}}' in text.decode(row.ids)
    assert row.ids.count(text.encode("<|im_end|>")[0]) == 2
    row = render(example, template("plain"), text)
    assert row is not None and taught(row, text) == ['{"name": "look", "arguments": {"day": "<|im_end|>"}}']


@pytest.mark.slow
def test_smollm2() -> None:
    from test_tokenizer import oracle, real

    folder, text = real("smollm2-135m")
    assert (
        show.hidden_system(template("chat"), text)
        == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    dicts = [{"role": "user", "content": "Where is Bern?"}, {"role": "assistant", "content": "In Switzerland."}]
    row = render(of(*(Message(**message) for message in dicts)), template("chat"), text)
    assert row is not None
    assert list(row.ids) == oracle(folder).apply_chat_template(dicts)["input_ids"][: len(row.ids)]
    assert taught(row, text) == ["In Switzerland."] and row.ids[-1] == text.eos_id
