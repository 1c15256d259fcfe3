"""The tiny model: what tests and dry runs take for granted about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.errors import UnknownName
from luthier.model import tiny


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_bytes_depend_on_the_seed_alone(architecture: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(99)
    again = bytes_of(tiny.write(tmp_path / "again", architecture))
    other = bytes_of(tiny.write(tmp_path / "other", architecture, seed=1))
    assert again == bytes_of(tiny_models[architecture])
    assert {name for name in other if other[name] != again[name]} == {"model.safetensors"}


def test_writing_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    tiny.write(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_it_loads_whole_and_has_opinions(architecture: str, tiny_models: dict[str, Path]) -> None:
    """No weight is left for transformers to draw, and the next token is neither a coin toss nor certain."""
    model, told = AutoModelForCausalLM.from_pretrained(
        tiny_models[architecture], local_files_only=True, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    ids = torch.arange(10, 90)[None]
    with torch.no_grad():
        chances = model.eval()(ids).logits.softmax(-1)
    entropy = -(chances * chances.log()).sum(-1).mean().item()
    assert 1.0 < entropy < math.log(tiny.VOCABULARY) - 0.4


def test_gemma_has_both_kinds_of_layer_and_a_short_window(tiny_models: dict[str, Path]) -> None:
    config = json.loads((tiny_models["gemma3"] / "config.json").read_text("utf-8"))
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    assert config["sliding_window"] == 16


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_the_tokenizer_keeps_every_text(tiny_folder: Path, text: str) -> None:
    backend = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    ids = backend.encode(text).ids
    assert backend.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= number < tiny.VOCABULARY for number in ids)


def test_special_tokens_are_whole_and_apart(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (tiny.END, tiny.NOTHING)
    for token in (tiny.START, tiny.END, tiny.NOTHING):
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1
    chinese = "你好，我想把星期一的预约改到星期四"
    assert len(tokenizer(chinese).input_ids) < len(chinese.encode()) / 2, "Chinese is in what it was made from"


def test_the_template_hides_a_system_prompt(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    user = {"role": "user", "content": "hi"}
    silent = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    spoken = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, user], tokenize=False)
    assert tiny.SYSTEM in silent and silent.endswith("<|im_start|>assistant\n")
    assert tiny.SYSTEM not in spoken and "Be brief." in spoken


def test_an_unknown_architecture_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="gemma3"):
        tiny.write(tmp_path / "new", "gemma")
    assert not (tmp_path / "new").exists()
