"""What the reparametrised family promises beyond the laws: counts, first values, schedules, honest files."""

from __future__ import annotations

import functools
import json

import laws
import pytest
import torch
from networks import network

from luthier import registry
from luthier.adapt import butterfly, drawn, halves
from luthier.adapt import folder as files
from luthier.adapt.folder import CONFIG, WEIGHTS, read_tensors
from luthier.errors import CheckpointError, SpecError, TrainingError
from luthier.model import fused
from luthier.spec import TrainSpec
from luthier.training.optim import Master

FAMILY = (
    "adalora", "boft", "c3a", "delora", "dora", "fourierft", "gralora", "hira", "hra", "loha", "lokr", "lora",
    "lora_plus", "miss", "oft", "pissa", "randlora", "road", "rslora", "shira", "vblora", "vera", "waveft",
)  # fmt: skip


def method(name, **options):
    return registry.make("methods", {"name": name, **options})


@functools.cache
def smollm2():
    """SmolLM2-135M's shapes on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).requires_grad_(False)


def learning(adapted):
    return sum(p.numel() for p in adapted.trainable().values())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"name": "lora", "rank": 4, "target_modules": ["q_proj", "v_proj"]}, 230_400),
        ({"name": "lora", "rank": 8}, 2_442_240),
        ({"name": "lora_plus", "rank": 8}, 2_442_240),
        ({"name": "rslora", "rank": 8}, 2_442_240),
        ({"name": "dora", "rank": 4, "target_modules": ["q_proj", "v_proj"]}, 253_440),
        ({"name": "pissa", "rank": 8}, 2_442_240),
        ({"name": "vera", "rank": 256, "target_modules": ["q_proj", "v_proj"]}, 38_400),
        ({"name": "ia3"}, 57_600),
        ({"name": "shira", "rank": 8}, 2_442_240),
        ({"name": "fourierft", "frequencies": 1000}, 30 * 7 * 1000),
        ({"name": "adalora", "first_rank": 8, "rank": 4}, 2_442_240 + 30 * 7 * 8),
    ],
)
def test_counts_are_the_published_ones(wanted, expected):
    adapted = registry.make("methods", wanted).attach(smollm2(), seed=0)
    assert learning(adapted) == expected
    adapted.detach()


@pytest.mark.parametrize("name", FAMILY)
def test_it_learns_on_a_bf16_base_and_leaves_it_bit_for_bit(name):
    base = network("llama").to(torch.bfloat16)
    kept = {key: value.clone() for key, value in base.state_dict().items()}
    made = method(name)
    adapted = laws.attach(made, base)
    assert {p.dtype for p in adapted.trainable().values()} == {torch.bfloat16}
    losses = laws.train(adapted, made, steps=4)
    assert losses[-1] < losses[0]
    plain = adapted.detach().state_dict()
    assert plain.keys() == kept.keys()
    assert all(torch.equal(plain[key], value) for key, value in kept.items())


@pytest.mark.parametrize("name", ["dora", "road", "vera", "delora", "boft", "pissa", "randlora"])
def test_what_begins_at_the_base_is_not_decayed(name):
    made = method(name)
    names = list(laws.attach(made, network("llama")).trainable())
    groups = made.groups(names)
    assert groups
    assert {wish["weight_decay"] for wish in groups.values()} == {0.0}
    assert len(groups) < len(names) or name == "pissa"


def test_lora_pluss_second_matrix_takes_larger_steps():
    made = method("lora_plus", ratio=16)
    parameters = laws.attach(made, network("llama")).trainable()
    master = Master(parameters, TrainSpec(clip=1e9), made.groups(list(parameters)))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    master.collect()
    master.step(1.0, 1e-3)
    steps = {name: float((p.detach() - before[name]).abs().mean()) for name, p in parameters.items()}
    assert {round(step / 1e-3) for name, step in steps.items() if "lora_A" in name} == {1}
    assert {round(step / 1e-3) for name, step in steps.items() if "lora_B" in name} == {16}


def test_rsloras_scale_falls_with_the_root_of_the_rank():
    def scale(name, **options):
        adapted = method(name, **options).attach(network("llama"), seed=0)
        return adapted.model.model.layers[0].self_attn.q_proj.scaling["default"]

    assert scale("rslora", rank=16, alpha=32) == 32 / 4
    assert scale("rslora", rank=64) == scale("rslora", rank=16) == 2
    assert scale("lora", rank=16, alpha=32) == 2


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_loras_other_first_values_are_as_fresh(init):
    laws.fresh_changes_nothing(lambda: method("lora", init=init))
    first = method("lora", init=init).attach(network("llama"), seed=3).trainable()
    usual = method("lora").attach(network("llama"), seed=3).trainable()
    assert not torch.equal(next(iter(first.values())), next(iter(usual.values())))
    b = next(p for name, p in first.items() if "lora_B" in name)
    assert bool((b == 0).all()) == (init == "gaussian")


def test_pissa_begins_at_the_leading_directions_of_an_untouched_base():
    base = network("llama")
    weights = {name: p.clone() for name, p in base.named_parameters()}
    adapted = method("pissa", rank=4, iterations=None).attach(base, seed=0)
    for name, module in adapted.model.named_modules():
        if not name.endswith("_proj"):
            continue
        a, b = module.lora_A["default"], module.lora_B["default"]
        assert torch.equal(module.get_base_layer().weight, weights[f"{name}.weight"])
        assert float(module.get_delta_weight("default").abs().max()) < 1e-5, "the update is zero at first"
        u, s, vh = torch.linalg.svd(weights[f"{name}.weight"])
        best = (u[:, :4] * s[:4]) @ vh[:4]
        assert torch.allclose(b.learning @ a.learning, best, atol=1e-5)
        assert torch.equal(a.learning, a.fixed)
        assert torch.equal(b.learning, -b.fixed)
    assert all(name.endswith("learning") for name in adapted.trainable())


def test_the_fast_svd_finds_the_leading_directions():
    weight = network("llama").model.layers[0].mlp.up_proj.weight.detach()
    exact, fast = (halves.leading(weight, 8, iterations) for iterations in (None, 16))
    error = torch.linalg.matrix_norm(weight - exact[1] @ exact[0])
    assert float(torch.linalg.matrix_norm(weight - fast[1] @ fast[0]) / error) < 1.001


def test_a_pissa_file_is_a_lora_of_twice_the_rank_whose_second_half_never_moved(tmp_path):
    made = method("pissa", rank=4)
    adapted = laws.attach(made, network("llama"))
    fresh = adapted.tensors()
    laws.train(adapted, made)
    adapted.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 8)
    for name, tensor in read_tensors(tmp_path / WEIGHTS).items():
        first, second = tensor.split(4, dim=0 if "lora_A" in name else 1)
        began, kept = fresh[name].split(4, dim=0 if "lora_A" in name else 1)
        assert torch.equal(second, kept)
        assert not torch.equal(first, began)


def test_pissa_trains_through_the_fused_step(monkeypatch):
    calls = []
    usual = fused._Fused.apply
    monkeypatch.setattr(fused._Fused, "apply", lambda *given: calls.append(1) or usual(*given))
    made = method("pissa", rank=4)
    laws.train(laws.attach(made, network("llama")), made, steps=1)
    assert len(calls) == 3 * 4  # layers that get one input run together


@pytest.mark.parametrize(
    "wanted",
    [
        {"name": "pissa", "rank": 60},
        {"name": "boft", "block": 7},
        {"name": "fourierft", "frequencies": 900_000},
        {"name": "gralora", "rank": 30, "blocks": 7},
        {"name": "lora", "target_modules": ["nosuch"]},
    ],
)
def test_what_this_base_cannot_bear_is_refused_and_the_base_left_clean(wanted):
    base = network("llama")
    before, types = laws.logits(base), [type(module) for module in base.modules()]
    with pytest.raises(SpecError):
        registry.make("methods", wanted).attach(base, seed=0)
    assert [type(module) for module in base.modules()] == types
    assert torch.equal(laws.logits(base), before)


def test_adalora_prunes_to_its_rank_and_says_so_in_the_file(tmp_path):
    made = method("adalora", first_rank=6, rank=2)
    adapted = laws.attach(made, network("llama"))
    laws.train(adapted, made)
    ranks = adapted.ranks()
    assert sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1, "layers differ"
    adapted.save(tmp_path)
    strengths = {n: t for n, t in read_tensors(tmp_path / WEIGHTS).items() if "lora_E" in n}
    assert sum(int((t != 0).sum()) for t in strengths.values()) == 2 * len(ranks)
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"] is None


def test_adaloras_penalty_pulls_directions_apart():
    adapted = laws.attach(method("adalora"), network("llama"))
    before = adapted.penalty()
    assert before is not None
    a = next(p for name, p in adapted.trainable().items() if "lora_A" in name)
    (gradient,) = torch.autograd.grad(before, [a])
    with torch.no_grad():
        a -= 0.5 * gradient / gradient.norm()
    after = adapted.penalty()
    assert after is not None
    assert float(after.detach()) < float(before.detach())
    assert laws.attach(method("adalora", orthogonality=0), network("llama")).penalty() is None


def test_adaloras_importances_come_back_and_its_gradients_are_lent():
    made = method("adalora")
    adapted = laws.attach(made, network("llama"))
    laws.train(adapted, made, steps=6)
    state = adapted.state()
    assert any(float(t.abs().sum()) > 0 for name, t in state.items() if name.startswith("exp_avg_ipt"))
    other = laws.attach(made, network("llama"))
    assert {n: t.shape for n, t in other.state().items()} == {n: t.shape for n, t in state.items()}
    other.restore(state)
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in state.items())
    parameters = adapted.trainable()
    own = {name: p.grad for name, p in parameters.items()}
    changed = adapted.stepped(7, laws.STEPS, {name: torch.ones_like(p) for name, p in parameters.items()})
    assert all(p.grad is own[name] for name, p in parameters.items())
    assert all("lora_E" in name for name in changed)
    with pytest.raises(CheckpointError):
        other.restore({})


def test_adalora_needs_the_number_of_steps():
    with pytest.raises(TrainingError, match="run's length"):
        method("adalora").attach(network("llama"), seed=0)
    with pytest.raises(SpecError, match="leave no steps"):
        method("adalora", warmup=0.6, settled=0.6)
    with pytest.raises(SpecError, match="ranks are taken away"):
        method("adalora", first_rank=4, rank=8)


@pytest.mark.parametrize("name", ["vera", "randlora", "fourierft", "waveft"])
def test_what_is_drawn_again_is_not_stored_and_not_believed(name, tmp_path):
    made = method(name)
    adapted = laws.attach(made, network("llama"), seed=3)
    adapted.save(tmp_path)
    stored = read_tensors(tmp_path / WEIGHTS)
    assert set(stored) == set(adapted.tensors())
    assert sum(t.numel() for t in stored.values()) == learning(adapted), "nothing but what learns is in the file"
    other = laws.attach(method(name), network("llama"), seed=4)
    assert drawn.fingerprint(other.wrapped) != drawn.fingerprint(adapted.wrapped), "another seed draws others"
    assert torch.equal(
        laws.logits(method(name).load(network("llama").bfloat16(), tmp_path).model),
        laws.logits(network("llama").bfloat16()),
    )
    config = json.loads((tmp_path / CONFIG).read_text())
    key = next(key for key in ("projection_prng_key", "random_loc_seed") if key in config)
    (tmp_path / CONFIG).write_text(json.dumps({**config, key: config[key] + 1}))
    with pytest.raises(CheckpointError, match="draws other random parts"):
        method(name).load(network("llama"), tmp_path)


def test_equal_adapters_are_equal_files(tmp_path):
    """safetensors writes metadata in the order of a hash table, which changes from file to file."""
    notes = {f"note{index}": str(index) for index in range(12)}
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        files.write(tmp_path / name, {}, {"x": torch.ones(3)}, notes)
    assert len({(tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "two", "three")}) == 1
    assert read_tensors(tmp_path / "one" / WEIGHTS)["x"].tolist() == [1, 1, 1]
    assert files.read_notes(tmp_path / "one" / WEIGHTS) == {"format": "pt", **notes}


@pytest.mark.parametrize("damage", ["beyond", "negative", "float"])
def test_positions_outside_a_matrix_are_refused(tmp_path, damage):
    from safetensors.torch import save_file

    laws.attach(method("shira", rank=4), network("llama")).save(tmp_path)
    stored = read_tensors(tmp_path / WEIGHTS)
    name = next(name for name in sorted(stored) if "indices" in name)
    assert stored[name].dtype == torch.int32
    if damage == "float":
        stored[name] = stored[name].float()
    else:
        stored[name][0, 0] = 10_000 if damage == "beyond" else -1
    save_file(stored, tmp_path / WEIGHTS)
    base = network("llama")
    with pytest.raises(CheckpointError, match="indices"):
        method("shira", rank=4).load(base, tmp_path)
    assert torch.equal(laws.logits(base), laws.logits(network("llama"))), "the base is left clean"


def test_boft_compiles_nothing(monkeypatch):
    import torch.utils.cpp_extension as extension
    from peft.tuners.boft import layer

    def compiled(*_args, **_options):
        raise AssertionError("a compiler was started")

    monkeypatch.setattr(layer, "_FBD_CUDA", None)
    monkeypatch.setattr(extension, "load", compiled)
    assert learning(method("boft").attach(network("llama"), seed=0))


def test_bofts_blocks_lie_along_the_diagonal_and_so_do_their_gradients():
    blocks = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = torch.stack([torch.block_diag(*one) for one in blocks])
    assert torch.equal(butterfly.BlockDiagonal.forward(blocks)[0], expected)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(expected, [blocks], upstream)
    assert torch.equal(butterfly.BlockDiagonal.backward(upstream, blocks)[0], gradient)


@pytest.mark.parametrize("law", ["it_learns", "merged_equals_attached", "disabled_and_detached_are_the_base"])
def test_bofts_rotations_can_follow_each_other(law):
    make = functools.partial(method, "boft", block=4, butterflies=2)
    getattr(laws, law)(make)
    adapted = make().attach(network("llama"), seed=0)
    assert next(iter(adapted.trainable().values())).shape[0] == 2


def test_attaching_says_nothing_on_the_screen(recwarn):
    for name in ("vera", "shira", "boft", "lora"):
        made = method(name)
        adapted = laws.attach(made, network("llama"))
        adapted.tensors()
        adapted.detach()
    assert [str(w.message) for w in recwarn if "gradient_checkpointing" not in str(w.message)] == []
