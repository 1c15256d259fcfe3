"""The examples run as a reader would run them, and show what they claim."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lora_by_hand_learns_and_merges():
    found = load("lora_by_hand").main()
    assert found["fresh_difference"] == 0
    assert found["last_loss"] < 0.2 * found["first_loss"]
    assert found["merge_difference"] < 1e-3


def test_lora_by_hand_equals_pefts():
    from peft import LoraConfig, get_peft_model

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(12, 20)

        def forward(self, x):
            return self.q_proj(x)

    torch.manual_seed(0)
    module, x = One(), torch.randn(5, 12)
    by_hand = load("lora_by_hand").LoraLinear(module.q_proj, rank=3, alpha=6)
    by_hand.B.data.normal_()
    wrapped = get_peft_model(module, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    layer = wrapped.base_model.model.q_proj
    layer.lora_A["default"].weight.data.copy_(by_hand.A)
    layer.lora_B["default"].weight.data.copy_(by_hand.B)
    assert torch.allclose(by_hand(x), wrapped(x), atol=1e-5)


def test_the_bare_loop_learns(tmp_path):
    module = load("bare_loop")
    found = module.main(module.sample_rows(tmp_path))
    assert found["last_loss"] < 0.3 * found["first_loss"]
    assert found["exact"] > 0.5


def test_examples_start_from_a_shell():
    done = subprocess.run([sys.executable, EXAMPLES / "lora_by_hand.py"], capture_output=True, text=True, check=True)
    assert "merge_difference" in done.stdout
