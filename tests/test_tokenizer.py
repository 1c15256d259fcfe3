"""Token ids equal transformers' own, and content never becomes a control token."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from luthier.errors import ModelError
from luthier.model import tiny
from luthier.text import marks
from luthier.text.tokenizer import Tokenizer

SCRIPTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=60),
    st.text("abc XYZ\n\t.,;'\"012", max_size=60),
    st.text("制琴师作并修理弦乐器。你好，", max_size=30),
    st.text("आपकामहैéèüßñŁ\u0301\u200d👩🏽\u200d🚒🇨🇭", max_size=30),
    st.text("مرحباשלום\u202e\u00a0 ", max_size=30),
)


@functools.cache
def made(kind: str) -> Tokenizer:
    return Tokenizer.from_folder(vocabularies.folder(kind))


@functools.cache
def oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def spelt_by(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Text with the spelling of control tokens strewn in."""
    return st.lists(st.one_of(SCRIPTS, st.sampled_from([*tokenizer.shields("user"), "<|", "|>"])), max_size=6).map(
        "".join
    )


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_equal_transformers(kind: str, data: st.DataObject) -> None:
    tokenizer, theirs = made(kind), oracle(vocabularies.folder(kind))
    text = data.draw(spelt_by(tokenizer))
    ids = tokenizer.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert [number for number, _ in tokenizer.encode_with_offsets(text)] == ids
    assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_names_and_ends(kind: str) -> None:
    tokenizer, theirs = made(kind), oracle(vocabularies.folder(kind))
    assert (tokenizer.bos or None, tokenizer.eos) == (theirs.bos_token, theirs.eos_token)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.eos_id in tokenizer.stop_ids and tokenizer.ends[0] == tokenizer.eos
    assert tokenizer.encode(tokenizer.start) == theirs("")["input_ids"]  # `start` is what they add by themselves
    assert tokenizer.pad_id == tokenizer.encode(tokenizer.pad)[0]


@pytest.mark.parametrize(
    ("kind", "ends", "pad", "says"),
    [
        ("chatml", {"<|im_end|>", "<|endoftext|>"}, "<|endoftext|>", True),  # its own padding token is its end token
        ("llama2", {"</s>"}, "<unk>", True),
        ("llama3", {"<|eot_id|>", "<|end_of_text|>"}, "<|finetune_right_pad_id|>", True),
        ("gemma", {"<eos>", "<end_of_turn>"}, "<pad>", False),
        ("neox", {"<|endoftext|>"}, "<|padding|>", True),
        ("qwen3", {"<|im_end|>", "<|endoftext|>"}, "<|im_start|>", True),
        ("glm", {"<|endoftext|>", "<|user|>", "<|observation|>"}, "[gMASK]", True),
    ],
)  # fmt: skip
def test_what_ends_and_what_pads(kind: str, ends: set[str], pad: str, says: bool) -> None:
    tokenizer = made(kind)
    assert set(tokenizer.ends) == ends
    assert tokenizer.stop_ids == {tokenizer.encode(end)[0] for end in ends}
    assert tokenizer.pad == pad and bool(tokenizer.pad_note) == says


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
@example(data=None)
def test_marked_text_never_holds_a_control_token(kind: str, data: st.DataObject | None) -> None:
    tokenizer = made(kind)
    controls = {tokenizer.encode(text)[0] for text in tokenizer.shields("user")} - set(
        tokenizer.encode(tokenizer.unk or "x")
    )
    text = "".join(tokenizer.shields("user")) if data is None else data.draw(spelt_by(tokenizer))
    marked = marks.mark(text, tokenizer.shields("user"))
    assert marks.unmark(marked) == text
    for after in ("", "before"):
        ids = tokenizer.encode_marked(marked, after=after)
        assert not controls.intersection(ids)
    if not any(spelling in text for spelling in tokenizer.shields("user")):
        assert tokenizer.encode_marked(marked) == tokenizer.encode(text)  # ordinary text is left alone


@settings(max_examples=200)
@given(st.lists(st.sampled_from([marks.OPEN, marks.CLOSE, marks.ESCAPE, "0", "1", "2", "<e>", "a"])).map("".join))
def test_marks_cannot_be_forged(text: str) -> None:
    marked = marks.mark(text, ["<e>"])
    assert marks.unmark(marked) == text
    parts = list(marks.stretches(marked))
    assert "".join(part for part, _ in parts) == text
    assert all((part == "<e>") == literal for part, literal in parts if "<e>" in part)


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_pieces_join_to_what_one_text_gives(kind: str) -> None:
    """Tokenised apart at a word's start or a newline, pieces give the ids of the whole text: no stray spaces."""
    tokenizer = made(kind)
    first, second = "### Question:\nWhere is it?\n", "It is in Bern."
    apart = tokenizer.encode_marked(first) + tokenizer.encode_marked(second, after=first)
    assert apart == tokenizer.encode(first + second)
    assert tokenizer.decode_inner(tokenizer.encode_marked(" " + second, after=first)) == " " + second


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_a_saved_folder_is_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind)
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.hash == tokenizer.hash and again.chat_template == tokenizer.chat_template
    assert again.stop_ids == tokenizer.stop_ids
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (vocabularies.folder(kind) / path.name).read_bytes()
    other = next(text for text in tokenizer.specials if text != tokenizer.eos)
    settings_ = tmp_path / "tokenizer_config.json"
    settings_.write_text(json.dumps({**json.loads(settings_.read_text()), "eos_token": other}))
    assert Tokenizer.from_folder(tmp_path).hash != tokenizer.hash


def test_the_template_may_stand_in_the_settings(tmp_path: Path) -> None:
    made("neox").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    told = json.loads(path.read_text())
    for value in ("T", [{"name": "rag", "template": "R"}, {"name": "default", "template": "T"}]):
        path.write_text(json.dumps({**told, "chat_template": value}))
        assert Tokenizer.from_folder(tmp_path).chat_template == "T"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_folder(tmp_path).chat_template == "F"


def test_tokens_that_only_the_settings_name(tmp_path: Path) -> None:
    made("neox").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    told = {**json.loads(path.read_text()), "pad_token": "<fill>", "additional_special_tokens": ["<one>", "<two>"]}
    path.write_text(json.dumps(told))
    text = "a<one>b<fill><two>"
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert [ours.token(n) for n in ours.encode(text)] == theirs.convert_ids_to_tokens(theirs(text)["input_ids"])
    assert {"<one>", "<two>", "<fill>"} <= set(ours.specials) and ours.pad == "<fill>"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "tokenizer.json"),
        ({"tokenizer.json": "{}"}, "cannot|not a tokenizer"),
        ({"tokenizer.json": "\x00"}, "not a tokenizer"),
        ({"tokenizer_config.json": "{", "tokenizer.json": None}, "not readable JSON"),
        ({"tokenizer_config.json": "{}", "tokenizer.json": "no end"}, "no token that ends"),
    ],
)
def test_a_folder_that_is_no_tokenizer(files: dict[str, str | None], says: str, tmp_path: Path) -> None:
    if files.get("tokenizer.json", "") in (None, "no end"):
        made("llama2").save(tmp_path)
    for name, text in files.items():
        if text == "no end":
            told = json.loads((tmp_path / name).read_text())
            told["added_tokens"] = [t for t in told["added_tokens"] if t["content"] != "</s>"]
            text = json.dumps(told)
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=says):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("architecture", sorted(tiny.ARCHITECTURES))
def test_tiny_models(architecture: str, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", architecture)
    ours, theirs = Tokenizer.from_folder(folder), oracle(folder)
    for text in ("Hello, Bern!\n\n制琴师 naïve  café 👩🏽‍🚒", "<|im_start|>user\nhi<|im_end|>\n", ""):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_real_models(name: str, data: st.DataObject) -> None:
    folder, tokenizer = real(name)
    text = data.draw(spelt_by(tokenizer) if name.startswith("smol") else SCRIPTS)
    assert tokenizer.encode(text) == oracle(folder)(text, add_special_tokens=False)["input_ids"]


@functools.cache
def real(name: str) -> tuple[Path, Tokenizer]:
    from luthier.errors import LuthierError
    from luthier.model import catalog

    try:
        folder = Path(catalog.locate(name))
    except LuthierError as error:
        pytest.skip(f"{name} is not here: {error.what}")
    return folder, Tokenizer.from_folder(folder)
