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


# --- the recipe that reads them ----------------------------------------------------------------------------------
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
THINGS = ("roses", "a boat", "bread", "a bicycle", "tea", "a fence", "a letter", "soup", "a map", "a song", "a lamp")


def trees(path: Path, count: int = 66) -> Path:
    """Hand-written trees in which the second reply is the better one; every seventh has no answer."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for index in range(count):
            thing = f"{THINGS[index % 11]} of kind {index}"
            good = said(
                f"To make {thing}, begin early.", asked("And then?", said(f"Rest; {thing} takes time.")), rank=0
            )
            replies = [] if index % 7 == 6 else [said("No.", rank=1), good]
            file.write(json.dumps(tree(asked(f"How does one make {thing}?", *replies))) + "\n")
    return path


def test_every_recipe_is_run_by_a_test() -> None:
    assert {path.name for path in RECIPES.glob("*.yaml")} == {"guanaco.yaml"}
    told = (RECIPES / "README.md").read_text("utf-8")
    assert all(f"({path.name})" in told for path in RECIPES.glob("*.yaml"))


def test_guanaco_runs_on_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    from luthier import cli, store

    path = trees(tmp_path / "own.trees.jsonl.gz")
    wishes = ["model=tiny", f"data.train={path}", f"runs={tmp_path / 'runs'}", "train.max_steps=3",
              "evaluate.max_new_tokens=8", "method.rank=4", "data.dev=0.15", "data.test=0.15"]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(RECIPES / "guanaco.yaml"), *wishes])
    out, err = capsys.readouterr()
    assert not end.value.code, err
    assert "runs as adamw" in out + err and "bits a weight" in out + err
    run = store.Run(tmp_path / "runs" / "guanaco")
    report = store.read_json(run.report)
    assert report["provenance"]["quantize"]["name"] == "nf4"
    assert json.loads((run.adapter / "luthier.json").read_text())["quantize"]["double"] is True
    kept = store.read_json(run.record)["training"]
    assert kept["steps"] == 3 and kept["best_dev_loss"] is not None


def test_guanacos_settings_are_the_papers() -> None:
    from luthier import spec

    asked_for = spec.load(RECIPES / "guanaco.yaml")
    assert asked_for.method == {
        "name": "lora", "rank": 64, "alpha": 16, "dropout": 0.1, "target_modules": "all-linear",
    }  # fmt: skip
    assert (asked_for.quantize.name, asked_for.quantize.double) == ("nf4", True)
    settings = asked_for.train
    assert (settings.learning_rate, settings.schedule, settings.warmup) == (2e-4, "constant", 0.0)
    assert (settings.betas, settings.clip, settings.optimizer) == ((0.9, 0.999), 0.3, "paged_adamw")
    text = (RECIPES / "guanaco.yaml").read_text("utf-8")
    assert "9,209" in text and "9,846" in text
    for size, layers, hidden, inner in (
        (7, 32, 4096, 11008),
        (13, 40, 5120, 13824),
        (33, 60, 6656, 17920),
        (65, 80, 8192, 22016),
    ):
        gigabytes = layers * (4 * hidden**2 + 3 * hidden * inner) * 4.127 / 8 / 1e9
        assert f"#   {size}B" in text and f"{gigabytes:.1f} GB" in text
