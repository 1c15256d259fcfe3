"""Loading: frozen, whole, on the right device in the right format, and every mishap said with its remedy."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import ModelError, UsageError
from luthier.model import load


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "own"))


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text("utf-8")), **keys}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), "utf-8")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_a_loaded_model_is_frozen_and_says_what_it_is(architecture: str, tiny_models: dict[str, Path]) -> None:
    model = load.load_model(tiny_models[architecture], dtype="float32", device="cpu")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    told = load.describe(model)
    assert {key: told[key] for key in ("layers", "hidden", "vocab", "context")} == {
        "layers": 2, "hidden": 64, "vocab": 600, "context": 1024,
    }  # fmt: skip
    assert (told["dtype"], told["device"]) == ("float32", "cpu")
    assert told["architecture"].lower().startswith(architecture.replace("_", ""))
    weights = load_file(tiny_models[architecture] / "model.safetensors")
    assert told["parameters"] == sum(value.numel() for value in weights.values())


@pytest.mark.parametrize("dtype", load.DTYPES)
def test_the_weights_come_in_the_format_asked_for(dtype: str, tiny_folder: Path) -> None:
    model = load.load_model(tiny_folder, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    stored = load_file(tiny_folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.get_parameter("model.norm.weight"), stored.to(getattr(torch, dtype)))


def test_auto_takes_bfloat16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert load.pick_dtype("auto", "cpu") == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True})
    assert load.pick_dtype("auto", "cpu") == torch.float32
    assert load.pick_dtype("bfloat16", "cpu") == torch.bfloat16, "what was asked for stands"
    assert load.pick_dtype("auto", "mps") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert load.pick_dtype("auto", "cuda:0") == torch.float32, "an emulated bfloat16 is not a fast one"


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert load.pick_device("auto") == "cpu"
    with pytest.raises(ModelError, match=r"no cuda.*device: auto \(here: cpu\)"):
        load.pick_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert load.pick_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert load.pick_device("auto") == "cuda" and load.pick_device("cuda:1") == "cuda:1"
    with pytest.raises(ModelError, match="no cuda:2"):
        load.pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:one", ""])
def test_what_is_no_device_is_wrong_use(name: str) -> None:
    with pytest.raises(UsageError, match="known: auto, cpu, cuda, mps"):
        load.pick_device(name)


def test_what_is_no_dtype_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
        load.pick_dtype("bfloat", "cpu")


def test_pickled_weights_are_never_read(own: Path) -> None:
    torch.save(load_file(own / "model.safetensors"), own / "pytorch_model.bin")
    (own / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is pickled.*save_pretrained"):
        load.load_model(own)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a whole model folder"):
        load.load_model(tmp_path)


def test_a_config_without_weights(own: Path) -> None:
    (own / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="there are no weights"):
        load.load_model(own)


def test_a_weight_that_is_missing_is_not_made_up(own: Path) -> None:
    weights = load_file(own / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load.load_model(own)


def test_a_weight_of_another_shape_is_not_made_up(own: Path) -> None:
    change_config(own, intermediate_size=96)
    with pytest.raises(ModelError):
        load.load_model(own)


def test_damaged_weights(own: Path) -> None:
    path = own / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for damaged in (whole[: len(whole) // 2], whole[:8] + b"?" * length + whole[8 + length :], b""):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="damaged weights"):
            load.load_model(own)


def test_an_unknown_architecture_is_named(own: Path) -> None:
    change_config(own, model_type="llamma", architectures=["LlammaForCausalLM"])
    with pytest.raises(ModelError, match="'llamma' is not known to transformers"):
        load.load_model(own)


def test_a_model_that_brings_code_is_not_run_unasked(own: Path) -> None:
    (own / "modeling_own.py").write_text("raise SystemExit('it ran')\n", "utf-8")
    change_config(own, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(ModelError, match=r"trust_remote_code: true"):
        load.load_model(own)


def test_a_known_architecture_keeps_to_the_librarys_code(own: Path) -> None:
    (own / "modeling_own.py").write_text("raise SystemExit('it ran')\n", "utf-8")
    change_config(own, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert load.describe(load.load_model(own))["architecture"] == "LlamaForCausalLM"


def test_an_encoder_is_no_language_model_to_tune(own: Path) -> None:
    change_config(own, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(ModelError, match="'t5' cannot be loaded as a causal language model"):
        load.load_model(own)


@pytest.mark.parametrize("text", ["[]", "{}", '{"model_type": 3}'])
def test_a_config_that_says_nothing(own: Path, text: str) -> None:
    (own / "config.json").write_text(text, "utf-8")
    with pytest.raises(ModelError, match="names no `model_type`"):
        load.load_model(own)


def test_loading_says_nothing_on_the_screen(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load.load_model(tiny_folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
