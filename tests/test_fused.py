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
    assert len(seen) == 3 * 4  # queries, keys and values; their output; gate and up; down


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"], ["up_proj", "down_proj", "o_proj"]])
def test_any_choice_of_layers_trains_alike(targets, monkeypatch):
    got = gradients(moved(target_modules=targets))
    monkeypatch.setattr(fused, "_vanilla", lambda module, x: False)
    expected = gradients(moved(target_modules=targets))
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def attention():
    adapted = moved()
    return adapted, adapted.model.model.layers[0].self_attn


def test_each_layer_answers_the_input_that_it_is_given():
    _, layer = attention()
    one, two = torch.randn(2, 1, 5, 64).unbind()
    usual = {name: fused.run([getattr(layer, name)], one)[0].detach() for name in ("q_proj", "k_proj", "v_proj")}
    layer.q_proj(two)  # what waits now is of another input
    for name in ("v_proj", "q_proj", "k_proj"):
        torch.testing.assert_close(getattr(layer, name)(one), usual[name])


def test_an_input_that_was_changed_in_place_is_computed_again():
    _, layer = attention()
    one = torch.randn(1, 5, 64)
    layer.q_proj(one)
    with torch.no_grad():
        one.mul_(2.0)
    torch.testing.assert_close(layer.k_proj(one), fused.run([layer.k_proj], one)[0])


def test_nothing_waits_once_all_have_been_asked():
    adapted, layer = attention()
    adapted.model(input_ids=IDS)
    group = layer.q_proj.forward.args[2]
    assert group._given is None
    assert not group._waiting


def test_an_output_that_nobody_uses_gives_no_gradient():
    adapted, layer = attention()
    one = torch.randn(1, 5, 64, requires_grad=True)
    wanted = layer.k_proj(one).square().sum()
    trainable = adapted.trainable()
    own = [p for name, p in trainable.items() if "layers.0" in name and "q_proj" in name]
    slopes = torch.autograd.grad(wanted, [one, *own])
    assert slopes[0].abs().sum() > 0
    assert all(float(slope.abs().sum()) == 0 for slope in slopes[1:])
