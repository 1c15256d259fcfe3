"""The fused LoRA layer trains like PEFT's, and is out of the way where it does not apply."""

from __future__ import annotations

import pytest
import torch
from networks import network

from luthier import registry
from luthier.model import fused

IDS = torch.tensor([[5, 9, 40, 77, 3, 8, 120, 44]])


def gradients(adapted) -> torch.Tensor:
    loss = adapted.model(input_ids=IDS, labels=IDS).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapted.trainable().values()))])


def moved(**options):
    adapted = registry.make("methods", {"name": "lora", **options}).attach(network("llama"), seed=0)
    torch.manual_seed(1)
    for p in adapted.trainable().values():
        p.data += 0.1 * torch.randn_like(p)
    adapted.model.train()
    return adapted


def test_gradients_equal_pefts(monkeypatch):
    calls = []
    monkeypatch.setattr(fused, "_vanilla", lambda module, x: calls.append(1) and False)
    expected = gradients(moved())
    assert calls, "the fused path was asked"
    monkeypatch.undo()
    got = gradients(moved())
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert not torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("how", ["dropout", "eval", "disabled", "no_grad"])
def test_everything_else_is_pefts_own(how, monkeypatch):
    adapted = moved(dropout=0.5) if how == "dropout" else moved()
    monkeypatch.setattr(fused._Fused, "apply", lambda *a: pytest.fail("fused where it must not be"))
    if how == "eval":
        adapted.model.eval()
    with torch.set_grad_enabled(how != "no_grad"):
        if how == "disabled":
            with adapted.disabled():
                adapted.model(input_ids=IDS)
        else:
            adapted.model(input_ids=IDS)


def test_it_is_used_in_training(monkeypatch):
    seen = []
    usual = fused._Fused.apply
    monkeypatch.setattr(fused._Fused, "apply", lambda *a: (seen.append(1), usual(*a))[1])
    moved().model(input_ids=IDS)
    assert len(seen) == 3 * 7
