"""Layouts of a row: recognised without being told, shown, and refused with what to write where they are not clear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.formats import FORMATS, Layout, Unrecognised, parse, recognise
from luthier.data.read import read
from luthier.errors import DataError, Fault
from luthier.records import Example, Message, Origin

ASKED, SAID = Message("user", "q"), Message("assistant", "a")
HERE = Origin("rows.jsonl", 7)


def one(row: dict[str, Any], **settings: Any) -> Example:
    """The example that a lone row becomes."""
    found = outcome(row, **settings)
    assert isinstance(found, Example), found
    return found


def outcome(row: dict[str, Any], system: str | None = None, **settings: Any) -> Example | list[Fault]:
    layout = recognise([row], **settings)
    return parse(row, layout, HERE, tags=settings.get("tags", ()), system=system)


def faults(row: dict[str, Any], **settings: Any) -> str:
    found = outcome(row, **settings)
    assert isinstance(found, list) and all(fault.where == "rows.jsonl:7" for fault in found)
    return "\n".join(map(str, found))


SAME = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "messages in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "a"}]},
        ]
    },
    "messages as text": {
        "messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]',
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "sharegpt singular": {"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "alpaca without input": {"instruction": "q", "output": "a"},
    "alpaca with its own rendering": {"instruction": "q", "input": "", "output": "a", "text": "### Instruction: q"},
    "oasst": {
        "message_tree_id": "1",
        "prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a"}]},
    },
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "prompt_completion of turns": {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
    **{
        f"qa {question}/{answer}": {question: "q", answer: "a"}
        for question in ("query", "prompt", "input", "instruction", "question", "problem", "Question")
        for answer in ("response", "answer", "output", "target", "completion", "Answer")
        if (question, answer) not in {("instruction", "output"), ("prompt", "completion")}
    },
    "qa beside metadata": {"id": 3, "question": "q", "answer": "a", "source": "web"},
}


@pytest.mark.parametrize("name", SAME)
def test_a_layout_is_recognised_and_gives_the_same_example(name: str) -> None:
    example = one(SAME[name])
    assert example.messages == (ASKED, SAID) and str(example.origin) == "rows.jsonl:7"
    assert recognise([SAME[name]]).name == name.split()[0]
    assert example.id == one(SAME["messages"]).id


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("text", "preference")])
def test_a_format_can_be_named(format: str) -> None:
    row = next(row for name, row in SAME.items() if name.split()[0] == format)
    assert one(row, format=format).messages == (ASKED, SAID)
    with pytest.raises(Unrecognised):
        recognise([{"a": "x", "b": "y"}], format=format)


def test_an_unknown_format_has_a_suggestion() -> None:
    with pytest.raises(Unrecognised) as caught:
        recognise([{"text": "x"}], format="sharegtp")
    assert "did you mean 'sharegpt'" in caught.value.remedy


def test_columns_name_a_format_of_their_own() -> None:
    row = {"v1": "a", "v2": "q", "rules": "be brief", "other": 1}
    example = one(row, columns={"prompt": "v2", "answer": "v1", "system": "rules"})
    assert example.messages == (Message("system", "be brief"), ASKED, SAID)
    assert recognise([row], columns={"prompt": "v2", "answer": "v1"}).unused == ("rules", "other")


@pytest.mark.parametrize(
    ("columns", "what", "remedy"),
    [
        ({"prompt": "v3", "answer": "v1"}, "no column 'v3'", "known: v1, v2"),
        ({"promt": "v2", "answer": "v1"}, "unknown part 'promt'", "did you mean 'prompt'"),
        ({"prompt": "v2"}, "no 'answer'", "v1, v2"),
    ],
)
def test_columns_that_cannot_be_are_refused(columns: dict[str, str], what: str, remedy: str) -> None:
    with pytest.raises(Unrecognised) as caught:
        recognise([{"v1": "a", "v2": "q"}], columns=columns)
    assert what in caught.value.what and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("row", "what", "remedy"),
    [
        (
            {"department": "d", "title": "t", "ask": "long question", "answer": "a"},
            "which column is the question",
            "ask",
        ),
        ({"question": "q", "output": "a", "answer": "a"}, "several columns", "prompt: question"),
        ({"text": "a long text", "category": "c"}, "none of its columns", "{prompt: text, answer: category}"),
        ({"instruction": "q", "context": "c", "response": "a"}, "'context' would be left out", "join it"),
        ({"question": "q", "title": "t"}, "which column is the answer", "prompt: question, answer: title"),
        ({"data": [{"text": "x"}]}, "no text", '{"prompt": "...", "answer": "..."}'),
        ({"messages": [], "label": True}, "good or bad", "label is true"),
        ({"prompt": "q", "completion": "a", "label": False}, "good or bad", "label is true"),
    ],
)
def test_an_unclear_layout_says_what_to_write(row: dict[str, Any], what: str, remedy: str) -> None:
    with pytest.raises(Unrecognised) as caught:
        recognise([row])
    assert what in caught.value.what and remedy in caught.value.remedy


def test_the_usual_row_decides_and_others_are_faults() -> None:
    rows = [{"note": "x"}, *[{"question": "q", "answer": "a"}] * 5]
    layout = recognise(rows)
    assert layout.name == "qa"
    found = parse(rows[0], layout, HERE)
    assert isinstance(found, list) and "has no 'question'" in str(found[0])


def test_plain_text_only_where_nothing_else_could_be_meant() -> None:
    assert one({"text": "a", "url": "u"}).messages == (SAID,)
    with pytest.raises(Unrecognised):
        recognise([{"text": "a", "label": "b"}])


def test_alpaca_joins_input_and_history_and_system() -> None:
    row = {"instruction": "i", "input": "x", "output": "a", "system": "s", "history": [["q", "a"]]}
    assert one(row).messages == (Message("system", "s"), ASKED, SAID, Message("user", "i\nx"), SAID)


def test_the_tasks_system_message_stands_where_a_row_has_none() -> None:
    assert one({"question": "q", "answer": "a"}, system="s").messages[0] == Message("system", "s")
    own = {"messages": [{"role": "system", "content": "own"}, *SAME["messages"]["messages"]]}
    assert one(own, system="s").messages[0] == Message("system", "own")


# ---- messages ----------------------------------------------------------------------------------------------------
def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, *turns], **more}


@pytest.mark.parametrize(
    ("key", "value", "weight"),
    [
        ("weight", 0, 0.0),
        ("weight", 1, 1.0),
        ("loss_weight", 0.5, 0.5),
        ("loss_scale", 2.0, 2.0),
        ("loss", False, 0.0),
        ("train", True, 1.0),
        ("weight", None, None),
    ],
)
def test_a_turn_may_say_its_weight(key: str, value: Any, weight: float | None) -> None:
    example = one(
        chat(
            {"role": "assistant", "content": "x", key: value},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "a"},
        )
    )
    assert example.messages[1] == Message("assistant", "x", weight)


def test_tool_calls_become_openais_shape_with_arguments_as_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"city": "巴黎"}'}}
    example = one(
        chat(
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "[]"},
            {"role": "assistant", "content": "none"},
            tools=[{"name": "find", "parameters": {}}],
        )
    )
    function = {"name": "find", "arguments": {"city": "巴黎"}}
    assert example.messages[1].extra == {"tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    assert example.messages[2].extra == {"tool_call_id": "c1"}
    assert example.tools == ({"type": "function", "function": {"name": "find", "parameters": {}}},)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "function_call": {"name": "find", "arguments": '{"k": 1}'}},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "find", "arguments": {"k": 1}}]},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"k": 1}}'},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "find", "input": {"k": 1}}]},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "find", "arguments": {"k": 1}}'}]},
    ],
)
def test_every_shape_of_a_call_is_the_same_call(turn: dict[str, Any]) -> None:
    example = one(chat(turn))
    call = {"type": "function", "function": {"name": "find", "arguments": {"k": 1}}}
    assert example.messages[1] == Message("assistant", "", None, {"tool_calls": [call]})


def test_anthropic_tool_results_become_tool_turns() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]}
    example = one(
        chat(
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": "a"},
        )
    )
    assert example.messages[2] == Message("tool", "sunny", None, {"tool_call_id": "t1"})


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"role": "asistant", "content": "a"}], ["unknown role 'asistant'", "did you mean 'assistant'"]),
        (
            [{"role": "assistant", "contents": "a"}],
            ["unknown key 'contents'", "did you mean 'content'", "has no content"],
        ),
        ([{"content": "a"}], ["messages[1] has no role"]),
        ([{"role": "assistant", "content": 7}], ["messages[1].content must be a text, not a number"]),
        ([{"role": "assistant", "content": None}], ["has no content"]),
        ([{"role": "assistant", "content": [{"type": "image_url"}]}], ["a part of type 'image_url'"]),
        ([{"role": "assistant", "content": "a", "weight": "high"}], ["weight must be a number"]),
        (
            [{"role": "assistant", "content": "a", "weight": 0, "train": True}],
            ["weights that disagree (weight, train)"],
        ),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}], ["a tool call without a name"]),
        ([{"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}], ["not a JSON object"]),
        (["hello"], ["messages[1] must be an object, not a text"]),
        ([], ["ends with a turn of 'user'"]),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}], ["no answer to learn"]),
        ([{"rol": "x"}, {"role": "bot2", "content": "y"}], ["messages[1] has no role", "unknown role 'bot2'"]),
    ],
)
def test_every_fault_of_a_row_is_named_at_its_turn(turns: list[Any], expected: list[str]) -> None:
    text = faults(chat(*turns))
    assert all(part in text for part in expected), text


# ---- answers and tags ----------------------------------------------------------------------------------------------
def test_numbers_and_objects_are_written_out_as_answers() -> None:
    assert one({"prompt": "q", "answer": 3}).answer == "3"
    assert one({"prompt": "q", "answer": True}).answer == "true"
    assert one({"prompt": "q", "answer": {"天": 1}}).answer == '{"天": 1}'
    assert "must be a text, not a list" in faults({"prompt": "q", "answer": ["a"]})
    assert "must be a text, not an object" in faults({"prompt": {"a": 1}, "answer": "a"})


def test_tags_are_kept_and_must_exist() -> None:
    row = {"question": "q", "answer": "a", "topic": "shoes", "context": "c"}
    example = one(row, tags=["topic", "context"])
    assert example.tags == {"topic": "shoes", "context": "c"} and example.id == one({"question": "q", "answer": "a"}).id
    with pytest.raises(Unrecognised, match="'topik', which is no column"):
        recognise([row], tags=["topik", "context"])


# ---- preferences -------------------------------------------------------------------------------------------------
TURNS = [{"role": "user", "content": "q"}]
WELL, BADLY = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
PREFERENCES = {
    "TRL texts": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "TRL turns": {"prompt": TURNS, "chosen": WELL, "rejected": BADLY},
    "TRL, prompt implied": {"chosen": TURNS + WELL, "rejected": TURNS + BADLY},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "LLaMA-Factory v1": {"chosen_messages": TURNS + WELL, "rejected_messages": TURNS + BADLY},
    "OpenAI": {"input": {"messages": TURNS}, "preferred_output": WELL, "non_preferred_output": BADLY},
    "ms-swift": {"messages": TURNS + WELL, "rejected_response": "b"},
    "HH": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_rows_keep_both_answers(name: str) -> None:
    example = one(PREFERENCES[name])
    assert recognise([PREFERENCES[name]]).name == "preference"
    assert example.messages == (ASKED, SAID) and example.rejected == (Message("assistant", "b"),)


def test_a_pair_without_a_shared_prompt_is_a_fault() -> None:
    assert "share no prompt" in faults({"chosen": "a", "rejected": "b"})


# ---- anything at all -----------------------------------------------------------------------------------------------
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "x"]), inner, max_size=3
        ),
    ),
    max_leaves=8,
)
KEYS = ["messages", "conversations", "instruction", "output", "prompt", "completion", "chosen", "rejected", "question",
        "answer", "text", "tools", "system", "history", "label", "rejected_response", "input"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), st.sampled_from([None, *FORMATS]))
@settings(max_examples=400, deadline=None)
def test_no_row_raises_anything_but_a_refusal(row: dict[str, Any], format: str | None) -> None:
    try:
        found = outcome(row, format=format)
    except Unrecognised as error:
        assert error.what and error.remedy
        return
    if isinstance(found, Example):
        json.dumps([message.as_dict() for message in found.messages], ensure_ascii=False).encode()
        assert found.messages[-1].role == "assistant"
    else:
        assert found and all(fault.what for fault in found)


# ---- files -------------------------------------------------------------------------------------------------------
def test_a_file_without_a_known_layout_is_one_fault_not_one_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"v1": "ham", "v2": f"some words {n}"}) + "\n" for n in range(50)), "utf-8")
    with pytest.raises(DataError) as caught:
        read([path], on_bad="skip")
    assert len(caught.value.faults) == 1 and "{columns: {prompt: v2, answer: v1}}" in str(caught.value)


def test_the_layout_is_shown() -> None:
    assert str(Layout("columns", {"prompt": "v2", "answer": "v1"})) == "columns (prompt = v2, answer = v1)"
