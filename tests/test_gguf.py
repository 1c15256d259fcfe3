"""A .gguf file and the folder made from it are the same model and the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from model_fakes import write_gguf
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from luthier import store
from luthier.errors import ModelError, StorageError
from luthier.model import gguf

TEXTS = [
    "Hello, the year 2024\n 12\n",
    "你好，星期一 １２３",
    "<|im_start|>user\nhi<|im_end|>\n",
    "  two  spaces\t²½",
    "",
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_the_folder_holds_what_the_file_stands_for_bit_by_bit(
    kind: str, tiny_folder: Path, tmp_path: Path, out: Path
) -> None:
    meant = write_gguf(tiny_folder, tmp_path / "x.gguf", kind=kind)
    told = gguf.convert(tmp_path / "x.gguf", out)
    weights = load_file(out / "model.safetensors")
    assert told == {"architecture": "llama", "quantisation": kind}
    assert set(weights) == set(meant)
    assert all(weights[name].dtype == np.float32 and np.array_equal(weights[name], meant[name]) for name in meant)


def test_the_config_computes_the_same(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    write_gguf(tiny_folder, tmp_path / "x.gguf")
    gguf.convert(tmp_path / "x.gguf", out)
    first, second = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (tiny_folder, out))
    for key in ("num_attention_heads", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "head_dim"):
        assert first[key] == second[key], key
    assert first["rms_norm_eps"] == pytest.approx(second["rms_norm_eps"])


def test_the_tokenizer_is_the_same_one(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    write_gguf(tiny_folder, tmp_path / "x.gguf")
    gguf.convert(tmp_path / "x.gguf", out)
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tiny_folder, out))
    whole = AutoTokenizer.from_pretrained(out, local_files_only=True)
    for text in TEXTS:
        assert before.encode(text).ids == after.encode(text).ids == whole(text).input_ids
    assert whole.eos_token == "<|im_end|>" and whole.pad_token == "<|endoftext|>"
    assert (out / "chat_template.jinja").read_text("utf-8") == (tiny_folder / "chat_template.jinja").read_text("utf-8")


def test_digits_stand_apart_where_the_vocabulary_was_made_so(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    """SmolLM's rule, which transformers leaves out: with GPT-2's the newline and the space would be two tokens."""
    write_gguf(tiny_folder, tmp_path / "x.gguf", split="smollm")
    gguf.convert(tmp_path / "x.gguf", out)
    rule = Tokenizer.from_file(str(out / "tokenizer.json")).pre_tokenizer
    pieces = [piece for piece, _ in rule.pre_tokenize_str("x\n 12 ½")]
    assert pieces == ["x", "ĊĠ", "1", "2", "Ġ", "Â½"]


def test_an_unknown_rule_of_splitting_is_refused_unless_the_tokenizer_lies_beside(
    tiny_folder: Path, tmp_path: Path, out: Path
) -> None:
    place = tmp_path / "own"
    place.mkdir()
    write_gguf(tiny_folder, place / "x.gguf", split="of-my-own")
    with pytest.raises(ModelError, match=r"'of-my-own'.*tokenizer\.json"):
        gguf.convert(place / "x.gguf", out)
    for name in gguf.TOKENIZER_FILES[:2]:
        (place / name).write_bytes((tiny_folder / name).read_bytes())
    gguf.convert(place / "x.gguf", out)
    assert (out / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("keep", [0, 3, 40, 5000, -100])
def test_a_cut_file_is_named(keep: int, tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    write_gguf(tiny_folder, tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"x\.gguf.*not a readable GGUF"):
        gguf.convert(tmp_path / "x.gguf", out)


def test_too_little_disk_is_said_before_the_work(
    tiny_folder: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tiny_folder, tmp_path / "x.gguf")
    monkeypatch.setattr(store, "free_bytes", lambda folder: 1000)
    with pytest.raises(StorageError, match="LUTHIER_CACHE"):
        gguf.convert(tmp_path / "x.gguf", out)
    assert not list(out.iterdir())
