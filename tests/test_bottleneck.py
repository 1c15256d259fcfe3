"""Modules in and beside the blocks: every placement meets the laws, computes its formula and refuses hostile folders."""

from __future__ import annotations

import copy
import functools
import json

import laws
import pytest
import torch
from networks import network
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from luthier import registry
from luthier.adapt import beside
from luthier.adapt.blocks import blocks
from luthier.adapt.folder import CONFIG, WEIGHTS
from luthier.errors import CheckpointError, SpecError

# The defaults are held to the laws in test_methods; these are the other ways.
VARIANTS = [
    {"name": "bottleneck", "placement": "houlsby", "activation": "gelu", "size": 16},
    {"name": "bottleneck", "placement": "parallel", "activation": "silu", "size": 24},
    {"name": "bottleneck", "activation": "tanh", "layers": [-1, 0], "scale": 2.0},
    {"name": "compacter", "placement": "houlsby", "n": 2, "rank": 3, "size": 16},
    {"name": "compacter", "placement": "parallel", "n": 8, "activation": "relu"},
    {"name": "llama_adapter", "length": 3, "layers": 3},
]


def method(**wanted):
    return registry.make("methods", wanted)


def count(adapted):
    return sum(p.numel() for p in adapted.trainable().values())


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def make(request):
    return functools.partial(registry.make, "methods", request.param)


@pytest.mark.parametrize(
    "law",
    [
        laws.fresh_changes_nothing, laws.it_learns, laws.only_the_adapter_learns, laws.generation_is_the_models_own,
        laws.disabled_and_detached_are_the_base, laws.first_values_come_from_the_seed_alone,
    ],
)  # fmt: skip
def test_every_variant_meets_the_law(make, law):
    law(make)


@pytest.mark.parametrize(
    "law", [laws.saved_and_loaded_is_the_same, laws.peft_alone_loads_it_or_names_luthier, laws.it_survives_a_kill]
)
def test_every_variant_is_kept(make, law, tmp_path):
    law(make, tmp_path)


@pytest.mark.parametrize(("form", "recompute"), [("cascade", False), ("dense", True)])
def test_every_variant_is_right_in_trees(make, form, recompute):
    laws.trees_equal_separate_rows(make, form=form, recompute=recompute)


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
@pytest.mark.parametrize("name", ["bottleneck", "compacter", "llama_adapter"])
def test_more_families(name, kind):
    make = functools.partial(method, name=name)
    laws.fresh_changes_nothing(make, kind)
    laws.trees_equal_separate_rows(make, kind)


@functools.cache
def smollm2():
    """SmolLM2-135M's shapes without a single weight."""
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"name": "bottleneck"}, 2_231_040),  # 30 (2 576 64 + 64 + 576)
        ({"name": "bottleneck", "placement": "parallel"}, 2_231_040),
        ({"name": "bottleneck", "placement": "houlsby"}, 2 * 2_231_040),
        ({"name": "bottleneck", "layers": [-1]}, 2_231_040 // 30),
        ({"name": "compacter"}, 30 * (2 * (576 + 64) + 576 + 64) + 4**3),
        ({"name": "compacter", "placement": "houlsby", "rank": 2}, 60 * (4 * (576 + 64) + 576 + 64) + 4**3),
        ({"name": "llama_adapter"}, 28 * (10 * 576 + 1)),
    ],
)
def test_counts_on_the_reference_model(wanted, expected):
    adapted = registry.make("methods", wanted).attach(copy.deepcopy(smollm2()), seed=0)
    assert count(adapted) == expected
    assert adapted.saved_bytes() == 4 * expected


def _moved(adapted):
    """Give every trainable value a size that shows."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_(0.0, 0.3, generator=generator)
    return adapted


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_each_placement_computes_its_formula(kind, placement):
    chosen = method(name="bottleneck", placement=placement, size=8, scale=1.5, activation="silu")
    adapted = _moved(chosen.attach(network(kind), seed=0))
    block = blocks(adapted.model)[1]
    assert hasattr(block.attention[1], "bottleneck") == (placement == "houlsby")
    assert hasattr(block.mlp[1], "bottleneck")
    values = adapted.trainable()
    for site, module in (block.attention, block.mlp) if placement == "houlsby" else (block.mlp,):
        inputs, output = _seen(adapted.model, module)
        module.bottleneck.active = False
        _, own = _seen(adapted.model, module)
        prefix = f"base_model.model.{site}.bottleneck."
        down, up = ([values[f"{prefix}{part}.{leaf}"] for leaf in ("weight", "bias")] for part in ("down", "up"))
        narrow = F.silu(F.linear(inputs if placement == "parallel" else own, *down))
        assert torch.allclose(output, own + 1.5 * F.linear(narrow, *up), atol=1e-4)
        assert not torch.allclose(output, own, atol=1e-2)
        module.bottleneck.active = True


def _seen(model, module):
    """What the module reads and returns in one pass of the model."""
    seen = []

    def look(_, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        seen.append((states, output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(look, with_kwargs=True)
    laws.logits(model)
    handle.remove()
    return seen[0]


def test_a_kronecker_layer_is_the_sum_of_kronecker_products():
    generator = torch.Generator().manual_seed(0)
    shared = torch.nn.Parameter(torch.randn(4, 4, 4, generator=generator))
    left, right = torch.randn(4, 6, 2, generator=generator), torch.randn(4, 2, 3, generator=generator)
    layer = beside.Kronecker(shared, left, right, torch.randn(24, generator=generator))
    whole = sum(torch.kron(shared[i], left[i] @ right[i]) for i in range(4))
    assert torch.allclose(layer.weight(), whole, atol=1e-5)
    x = torch.randn(5, 12, generator=generator)
    assert torch.allclose(layer(x), x @ whole.T + layer.bias, atol=1e-5)


def test_all_blocks_share_compacters_small_matrices():
    adapted = method(name="compacter").attach(network("llama"), seed=0)
    small = {id(block.mlp[1].bottleneck.down.shared) for block in blocks(adapted.model)}
    small |= {id(block.mlp[1].bottleneck.up.shared) for block in blocks(adapted.model)}
    assert len(small) == 1
    assert id(adapted.trainable()["base_model.model.bottleneck_kronecker"]) in small


def test_the_model_moves_the_adapter_along():
    base = network("llama").to(torch.bfloat16)
    adapted = method(name="bottleneck", dropout=0.5).attach(base, seed=0)
    assert {p.dtype for p in adapted.trainable().values()} == {torch.bfloat16}
    module = blocks(base)[0].mlp[1].bottleneck
    assert not module.training
    base.train()
    assert module.training
    base.eval().to(torch.float32)
    assert {p.dtype for p in adapted.trainable().values()} == {torch.float32}


def test_dropout_acts_in_training_only():
    adapted = _moved(method(name="bottleneck", dropout=0.5).attach(network("llama"), seed=0))
    assert torch.equal(laws.logits(adapted.model), laws.logits(adapted.model))
    adapted.model.train()
    assert not torch.equal(laws.logits(adapted.model), laws.logits(adapted.model))


@pytest.mark.parametrize("name", ["bottleneck", "compacter"])
def test_nothing_is_left_behind(name):
    base = network("llama")
    adapted = method(name=name, placement="houlsby").attach(base, seed=0)
    copied = copy.deepcopy(adapted)  # a copy's hooks serve the copy
    plain = adapted.detach()
    assert not any("bottleneck" in part for part, _ in plain.named_modules())
    assert not any(module._forward_hooks for module in plain.modules())
    _moved(copied)
    assert not torch.equal(laws.logits(copied.model), laws.logits(plain))
    with copied.disabled():
        assert torch.equal(laws.logits(copied.model), laws.logits(plain))
    assert adapted.detach() is plain, "taking it off twice is harmless"


def test_two_at_once_are_refused():
    base = network("llama")
    method(name="bottleneck").attach(base, seed=0)
    with pytest.raises(SpecError, match="detach it first"):
        method(name="compacter").attach(base, seed=0)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [({"layers": [3]}, "3 is not a layer"), ({"layers": [0, -3]}, "names a layer twice"), ({"layers": [-4, 7]}, "-4")],
)
def test_layers_that_are_not_there(wanted, told):
    with pytest.raises(SpecError, match=told):
        method(name="bottleneck", **wanted).attach(network("llama"), seed=0)


def test_compacter_says_what_n_does_not_divide():
    with pytest.raises(SpecError, match="size 10") as caught:
        method(name="compacter", n=3, size=10).attach(network("llama"), seed=0)
    assert "hidden size 64" in str(caught.value), "all faults at once"


@pytest.mark.parametrize("name", ["bottleneck", "llama_adapter"])
def test_merging_is_refused_with_the_reason(name):
    with pytest.raises(SpecError, match="cannot be merged"):
        method(name=name).attach(network("llama"), seed=0).merge()


HOSTILE = [
    ("placement", "everywhere"), ("placement", None), ("size", 0), ("size", 10**9), ("size", "64"), ("size", True),
    ("size", 32), ("activation", "os.system"), ("scale", 0.0), ("scale", float("inf")), ("scale", float("nan")),
    ("dropout", 1.0), ("layers", [0, 0]), ("layers", [99]), ("layers", []), ("layers", "all"), ("layers", ["0"]),
    ("terms", 5), ("terms", 10**6), ("rank", 0), ("modules_to_save", ["lm_head"]), ("auto_mapping", {"x": "os"}),
    ("peft_type", "LORA"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_hostile_folder_is_refused_and_the_base_left_alone(tmp_path, key, value):
    _refused(tmp_path, "bottleneck", key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("adapter_len", 0), ("adapter_len", 10**9), ("adapter_len", "10"), ("adapter_layers", 99), ("adapter_layers", 2),
     ("target_modules", "mlp"), ("auto_mapping", {"parent_library": "os"}), ("peft_type", "LORA")],
)  # fmt: skip
def test_a_hostile_gate_is_refused(tmp_path, key, value):
    _refused(tmp_path, "llama_adapter", key, value)


def _refused(folder, name, key, value):
    method(name=name).attach(network("llama"), seed=0).save(folder)
    written = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**written, key: value}))
    base = network("llama")
    with pytest.raises((CheckpointError, SpecError)):
        method(name=name).load(base, folder)
    assert torch.equal(laws.logits(base), laws.logits(network("llama")))
    assert {n for n, _ in base.named_modules()} == {n for n, _ in network("llama").named_modules()}


def test_all_faults_of_a_folder_are_told_at_once(tmp_path):
    method(name="bottleneck").attach(network("llama"), seed=0).save(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    del written["placement"]
    (tmp_path / CONFIG).write_text(json.dumps({**written, "size": -1, "activation": "exec"}))
    with pytest.raises(CheckpointError) as caught:
        beside.read_shape(tmp_path)
    assert {fault.where for fault in caught.value.faults} == {"placement", "size", "activation"}


def test_tensors_of_another_kind_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    method(name="bottleneck").attach(network("llama"), seed=0).save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(torch.int32)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="int32"):
        method(name="bottleneck").load(network("llama"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"), [({"attention_bias": True}, "add twice"), ({"head_dim": 32}, "4 heads of 32")]
)
def test_llama_adapter_refuses_what_peft_computes_wrongly(settings, told):
    shape = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, **settings))
    with pytest.raises(SpecError, match=told):
        method(name="llama_adapter").attach(base, seed=0)


def test_llama_adapter_names_the_families_it_knows():
    with pytest.raises(SpecError, match=r"llama, mistral, gpt2 models; this one is qwen3"):
        method(name="llama_adapter").attach(network("qwen3"), seed=0)
    with pytest.raises(SpecError, match="has 3 layers, not 4"):
        method(name="llama_adapter", layers=4).attach(network("llama"), seed=0)


def test_llama_adapters_gate_opens():
    """The prompts learn only once the gates have left zero, and both do."""
    chosen = method(name="llama_adapter")
    adapted = chosen.attach(network("llama"), seed=0)
    before = {name: p.detach().clone() for name, p in adapted.trainable().items()}
    laws.train(adapted, chosen, steps=3)
    assert all(not torch.equal(p, before[name]) for name, p in adapted.trainable().items())
