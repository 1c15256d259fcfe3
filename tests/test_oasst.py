"""Conversation trees: the best-ranked reply at each turn, and what is passed over."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data import oasst
from luthier.data.formats import Unrecognised, parse, recognise
from luthier.data.read import read
from luthier.errors import DataError
from luthier.records import Example, Origin

SPAM = {"labels": {"spam": {"value": 0.75, "count": 4}}}


def said(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "text": text, "lang": "en", "replies": list(replies), **more}


def asked(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return said(text, *replies, **more) | {"role": "prompter"}


def tree(root: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root}


def outcome(row: dict[str, Any], **settings: Any) -> Any:
    return parse(row, recognise([row], **settings), Origin("trees.jsonl", 3))


def turns(root: dict[str, Any]) -> list[str]:
    found = outcome(tree(root))
    assert isinstance(found, Example), found
    return [message.content for message in found.messages]


def fault(root: Any, **settings: Any) -> str:
    found = outcome(tree(root), **settings)
    assert isinstance(found, list)
    return "\n".join(map(str, found))


GARDEN = asked(
    "How do I prune roses?",
    said("Badly.", rank=2),
    said(
        "In late winter, above an outward bud.",
        asked("And in summer?", said("Only what has faded.", rank=0), said("Never.", rank=1), rank=None),
        asked("Why?", rank=None),
        rank=0,
    ),
    said("Ask a gardener.", rank=1),
)


def test_the_best_ranked_reply_is_taken_at_each_turn() -> None:
    example = outcome(tree(GARDEN))
    assert [m.role for m in example.messages] == ["user", "assistant", "user", "assistant"]
    assert turns(GARDEN) == [
        "How do I prune roses?", "In late winter, above an outward bud.", "And in summer?", "Only what has faded.",
    ]  # fmt: skip


def test_it_is_recognised_and_can_be_named() -> None:
    assert recognise([tree(GARDEN)]).name == recognise([tree(GARDEN)], format="oasst").name == "oasst"
    assert recognise([tree(GARDEN)]).unused == ("message_tree_id", "tree_state")
    with pytest.raises(Unrecognised, match="not in the format 'oasst'"):
        recognise([{"prompt": "q", "completion": "a"}], format="oasst")
    assert recognise([{"prompt": "q", "completion": "a"}]).name == "prompt_completion"


@pytest.mark.parametrize(
    ("replies", "chosen"),
    [
        ([said("x", rank=1), said("y", rank=0)], "y"),
        ([said("x"), said("y", rank=3)], "y"),  # a ranked one goes before one that nobody ranked
        ([said("x", created_date="2023-02-05T10:00:00"), said("y", created_date="2023-02-04T10:00:00")], "y"),
        ([said("x", rank=None), said("y", rank=None)], "x"),
        ([said("x", rank=0, deleted=True), said("y", rank=1)], "y"),
        ([said("x", rank=0, review_result=False), said("y", rank=1, review_result=True)], "y"),
        ([said("x", rank=0, **SPAM), said("y", rank=1, labels={"spam": {"value": 0.25, "count": 4}})], "y"),
        ([said("x", rank=0, labels={"quality": {"value": 0.9, "count": 3}})], "x"),
    ],
)
def test_the_order_of_replies(replies: list[dict[str, Any]], chosen: str) -> None:
    assert turns(asked("q", *replies)) == ["q", chosen]


def test_it_ends_in_an_answer() -> None:
    assert turns(asked("q", said("a", asked("more?")))) == ["q", "a"]
    assert turns(asked("q", said("a", asked("more?", said("spam", **SPAM))))) == ["q", "a"]


@pytest.mark.parametrize(
    ("root", "told"),
    [
        (asked("q"), "nobody has answered"),
        (asked("q", said("a", deleted=True)), "nobody has answered"),
        (asked("q", said("a"), deleted=True), "its first message is deleted"),
        (asked("q", said("a"), **SPAM), "its first message is spam"),
        (asked("q", said("a") | {"role": "robot"}), "unknown role 'robot'"),
        (asked("q", said("a") | {"text": None}), "must be a text, not null"),
        (asked("q", said("a\0b")), "NUL character"),
        (asked("q") | {"replies": [3]}, "must be a list of messages"),
    ],
)
def test_a_tree_without_a_conversation_is_a_fault(root: dict[str, Any], told: str) -> None:
    assert told in fault(root)


def test_a_deep_tree_needs_no_stack() -> None:
    root = leaf = asked("0")
    for depth in range(1, 4001):
        leaf["replies"] = [(said if depth % 2 else asked)(str(depth))]
        leaf = leaf["replies"][0]
    assert len(turns(root)) == 4000 and oasst.passed_over(tree(root), {"tree": "prompt"}) == 0


def test_files_are_read_and_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    messy = asked("q", said("bad", deleted=True), said("good", asked("more", said("ad", **SPAM))))
    path = tmp_path / "2023.trees.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(tree(root)) + "\n" for root in (GARDEN, messy, asked("unanswered"))))
    with pytest.raises(DataError, match="nobody has answered"):
        read([path])
    dataset = read([path], on_bad="skip")
    assert len(dataset.examples) == 2
    (info,) = dataset.files
    assert (info.format, info.rows, info.skipped, info.passed_over) == ("oasst (tree = prompt)", 2, 1, 2)
