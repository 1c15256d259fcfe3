"""The laws that every method on the shelf meets by merely standing there."""

from __future__ import annotations

import json

import pytest
import torch
from networks import VOCABULARY, network

from luthier import registry
from luthier.errors import CheckpointError, SpecError
from luthier.model import adapt

METHODS = registry.names("methods")
IDS = torch.tensor([[5, 9, 40, 77, 3, 8, 120, 44]])


@pytest.fixture(params=METHODS)
def method(request):
    return registry.make("methods", request.param)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def train(adapted, steps: int = 8, rate: float = 0.05) -> list[float]:
    """Learn to say IDS; return the losses."""
    optimizer = torch.optim.Adam(adapted.trainable().values(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = adapted.model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_fresh_adapter_changes_nothing(method):
    base = network("llama")
    before = logits(base)
    after = logits(method.attach(base, seed=0).model)
    if method.fresh == "exact":
        assert torch.equal(before, after)
    elif method.fresh == "tolerance":
        assert torch.allclose(before, after, atol=1e-4)
    else:
        assert method.fresh.startswith("changes: ")


def test_it_learns_and_only_it_learns(method):
    base = network("llama")
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = method.attach(base, seed=0)
    losses = train(adapted)
    assert losses[-1] < losses[0]
    trainable = adapted.trainable()
    assert trainable and all(p.grad is not None for p in trainable.values())
    plain = adapted.detach().state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in kept.items())


def test_disabled_and_detached_are_the_base(method):
    base = network("llama")
    before = logits(base)
    adapted = method.attach(base, seed=0)
    train(adapted)
    assert not torch.equal(logits(adapted.model), before)
    with adapted.disabled():
        assert torch.equal(logits(adapted.model), before)
    assert torch.equal(logits(adapted.detach()), before)


def test_first_values_come_from_the_seed_alone(method):
    torch.manual_seed(5)
    one = method.attach(network("llama"), seed=3).trainable()
    torch.manual_seed(99)
    other = method.attach(network("llama"), seed=3).trainable()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    method.attach(network("llama"), seed=3)
    assert torch.equal(torch.rand(1), expected), "and the caller's randomness is left alone"


def test_saved_and_loaded_is_the_same(method, tmp_path):
    adapted = method.attach(network("llama"), seed=0)
    train(adapted)
    adapted.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {adapt.CONFIG, adapt.WEIGHTS}
    again = method.load(network("llama"), tmp_path)
    assert torch.equal(logits(again.model), logits(adapted.model))


def test_peft_alone_loads_it(method, tmp_path):
    from peft import PeftModel

    adapted = method.attach(network("llama"), seed=0)
    train(adapted)
    adapted.save(tmp_path)
    plain = PeftModel.from_pretrained(network("llama"), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(plain), logits(adapted.model))


def test_merged_equals_attached(method):
    if not method.merges:
        pytest.skip("does not merge, and says so")
    adapted = method.attach(network("llama"), seed=0)
    train(adapted)
    attached = logits(adapted.model)
    merged = adapted.merge()
    assert torch.allclose(logits(merged), attached, atol=2e-4)
    assert type(merged).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt_neox"])
def test_it_attaches_to_other_families(method, kind):
    base = network(kind)
    before = logits(base)
    adapted = method.attach(base, seed=0)
    assert torch.equal(logits(adapted.model), before)
    assert adapted.trainable()


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan", "garbage", "other_base"])
def test_what_does_not_fit_is_refused(method, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    adapted = method.attach(network("llama"), seed=0)
    adapted.save(tmp_path)
    path = tmp_path / adapt.WEIGHTS
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if damage == "missing":
        del tensors[first]
    elif damage == "extra":
        tensors["base_model.model.other"] = torch.zeros(1)
    elif damage == "shape":
        tensors[first] = torch.zeros(3, 3)
    elif damage == "nan":
        tensors[first] = torch.full_like(tensors[first], float("nan"))
    if damage == "garbage":
        path.write_bytes(b"\x80\x04pickle")
    else:
        save_file(tensors, path)
    base = network("gpt_neox" if damage == "other_base" else "llama")
    with pytest.raises((CheckpointError, SpecError, ValueError)) as caught:
        method.load(base, tmp_path)
    if damage in ("missing", "extra", "shape", "nan"):
        assert (first in str(caught.value)) != (damage == "extra")


@pytest.mark.parametrize(
    ("key", "value"),
    [("auto_mapping", {"base_model_class": "X", "parent_library": "os"}), ("corda_config", {"cache_file": "/etc/passwd"}),
     ("modules_to_save", ["lm_head"]), ("r", 100_000), ("peft_type", "NOSUCH"), ("loftq_config", {"x": 1})],
)  # fmt: skip
def test_steering_keys_are_refused(tmp_path, key, value):
    registry.make("methods", "lora").attach(network("llama"), seed=0).save(tmp_path)
    config = json.loads((tmp_path / adapt.CONFIG).read_text())
    (tmp_path / adapt.CONFIG).write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=key if key != "peft_type" else "NOSUCH"):
        adapt.read_config(tmp_path)


def test_lora_counts_are_the_published_ones():
    """2,442,240 at rank 8 on all linear layers of SmolLM2-135M (methods reference, section 1), from its shapes."""
    hidden, kv, inner, layers, rank = 576, 192, 1536, 30, 8
    shapes = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    assert layers * rank * sum(a + b for a, b in shapes) == 2_442_240
    adapted = registry.make("methods", {"name": "lora", "rank": 8}).attach(network("llama"), seed=0)
    small = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    assert sum(p.numel() for p in adapted.trainable().values()) == 3 * 8 * sum(a + b for a, b in small)
    assert VOCABULARY not in {n for p in adapted.trainable().values() for n in p.shape}, "the head stays frozen"
