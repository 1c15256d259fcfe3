"""The short form of RMS norms has the long form's values and gradients, and stands aside elsewhere."""

from __future__ import annotations

import networks
import pytest
import torch

from luthier.model import norms

IDS = torch.tensor([[5, 9, 40, 77, 3, 8, 120, 44]])


def run(model, *, short: bool, learns: bool):
    for name, weight in model.named_parameters():
        weight.requires_grad_(learns or "embed" in name)
    model.train()
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    if short:
        with norms.quick_norms(model):
            loss = model(input_ids=IDS, labels=IDS).loss
            return loss.detach(), torch.autograd.grad(loss, wanted)
    loss = model(input_ids=IDS, labels=IDS).loss
    return loss.detach(), torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kind", networks.KINDS)
def test_loss_and_gradients_are_the_models_own(kind, learns):
    usual, slopes = run(networks.network(kind), short=False, learns=learns)
    quick, others = run(networks.network(kind), short=True, learns=learns)
    torch.testing.assert_close(quick, usual, rtol=1e-5, atol=1e-6)
    for one, two in zip(slopes, others, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6 + 1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(("kind", "offset"), [("llama", 0.0), ("qwen3", 0.0), ("gemma3", 1.0), ("gpt_neox", None)])
def test_the_family_is_found_by_its_values(kind, offset):
    model = networks.network(kind)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
    found = {norms._offset(module) for module in model.modules() if "Norm" in type(module).__name__}
    assert found == {offset}


def test_a_norm_of_another_formula_is_left_alone():
    class LoudRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return 3 * x

    assert norms._offset(LoudRMSNorm()) is None


@pytest.mark.parametrize("how", ["evaluating", "no_grad", "outside"])
def test_elsewhere_the_model_runs_its_own(how, monkeypatch):
    monkeypatch.setattr(norms._RMS, "apply", lambda *a: pytest.fail("short where it must not be"))
    model = networks.network("llama").train(how != "evaluating")
    if how == "outside":
        with norms.quick_norms(model):
            pass
        model(input_ids=IDS)
        assert not any("forward" in module.__dict__ for module in model.modules())
        return
    with norms.quick_norms(model), torch.set_grad_enabled(how != "no_grad"):
        model(input_ids=IDS)


def test_it_is_used_in_training(monkeypatch):
    seen = []
    usual = norms._RMS.apply
    monkeypatch.setattr(norms._RMS, "apply", lambda *a: (seen.append(1), usual(*a))[1])
    model = networks.network("llama").train()
    with norms.quick_norms(model):
        model(input_ids=IDS)
    assert len(seen) == 3 * 2 + 1
