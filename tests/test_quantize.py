"""Quantised bases: the format, what is kept, the same product everywhere, and what each method makes of it."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil

import laws
import pytest
import torch
from networks import network
from test_train_flow import write_task
from torch.nn import functional as F

from luthier import registry, spec, store
from luthier.adapt import door
from luthier.errors import CheckpointError, ModelError, SpecError
from luthier.model import catalog, fused, load, quantize
from luthier.model.attention import recompute_activations
from luthier.spec import QuantizeSpec, TrainSpec
from luthier.training import moments
from luthier.training.optim import Master

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs the extra 'quantize'")
NF4, FP4, INT8 = (QuantizeSpec(name=name) for name in ("nf4", "fp4", "int8"))
KINDS = {"nf4": NF4, "nf4 single": QuantizeSpec(name="nf4", double=False), "fp4": FP4, "int8": INT8}
# NF4's values (Dettmers et al. 2305.14314, appendix E).
CODES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def quantised(asked: QuantizeSpec = NF4, kind: str = "llama"):
    return quantize.quantise(network(kind), asked)


@pytest.fixture(params=KINDS)
def asked(request) -> QuantizeSpec:
    return KINDS[request.param]


@pytest.fixture
def lora():
    return registry.make("methods", {"name": "lora", "rank": 4})


# --- the format --------------------------------------------------------------------------------------------------


def test_nf4_is_the_papers_format():
    """Each block of 64 weights by its absolute maximum, then the nearest of sixteen values: written out in torch."""
    plain = network("llama")
    weight = plain.model.layers[1].mlp.up_proj.weight.detach().clone()
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[:, :, None] / scale[:, :, None] - CODES).abs().argmin(-1)
    expected = (CODES[nearest] * scale).reshape(weight.shape)
    layer = quantize.quantise(plain, QuantizeSpec(name="nf4", double=False)).model.layers[1].mlp.up_proj
    assert torch.allclose(quantize.weight_of(layer, torch.float32), expected, atol=1e-6)


def test_int8_is_each_rows_largest_value_in_127_parts():
    plain = network("llama")
    weight = plain.model.layers[1].mlp.up_proj.weight.detach().half().float()
    scale = weight.abs().amax(1, keepdim=True)
    expected = (weight / scale * 127).round() * scale / 127
    found = quantize.weight_of(quantize.quantise(plain, INT8).model.layers[1].mlp.up_proj, torch.float32)
    assert float((found - expected).abs().max()) <= float((scale / 127).max()) * 1.01  # half-way values may round up
    assert float((found - expected).abs().mean()) < float(scale.mean()) / 127 * 1e-2


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (NF4, 4.127),
        (FP4, 4.127),
        (KINDS["nf4 single"], 4.5),
        (INT8, 8.026),
        (QuantizeSpec(name="nf4", block=128), 4.063),
    ],
)
def test_bits_of_the_matrices_are_the_published_ones(asked, expected):
    """4 + 32/64 bits; with double quantisation 4 + 8/64 + 32/(64 * 256), and one offset a matrix."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "vocab_size": 500}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1)).eval().requires_grad_(False)
    whole = sum(p.numel() for p in model.parameters())
    told = quantize.bits(quantize.quantise(model, asked))
    assert told.matrices == pytest.approx(expected, abs=2e-3)
    assert told.parameters == quantize.parameters(model) == whole
    kept_in_full = whole - told.quantised
    tables = 7 * (64 + 1024 if asked.double else 64)
    size = told.quantised * told.matrices / 8 + 4 * kept_in_full + (0 if asked.name == "int8" else tables)
    assert told.bytes == pytest.approx(size, rel=1e-9)
    assert told.whole == pytest.approx(8 * size / whole) and told.whole > told.matrices


def test_a_plain_model_has_no_bits_to_tell():
    with pytest.raises(ModelError, match="no matrix of this model is quantised"):
        quantize.bits(network("llama"))
    assert quantize.found(network("llama")) == {}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_only_matrices_inside_the_blocks_are_quantised(kind):
    model = quantised(NF4, kind)
    names = quantize.layers(model)
    assert names and all(".layers." in name for name in names)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    left = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear} - names.keys()
    assert {model.get_submodule(name) for name in left} == {model.get_output_embeddings()}
    assert all(p.is_floating_point() for n, p in model.named_parameters() if n.removesuffix(".weight") not in names)


# --- loading -----------------------------------------------------------------------------------------------------


def test_loading_quantises_as_in_memory(asked, tiny_folder):
    loaded = load.load_model(tiny_folder, dtype="float32", quantize=asked)
    made = quantize.quantise(load.load_model(tiny_folder, dtype="float32"), asked)
    assert torch.equal(laws.logits(loaded), laws.logits(made))
    assert quantize.found(loaded) == quantize.found(made) == asked.model_dump()
    assert load.describe(loaded)["quantize"] == asked.model_dump()
    assert load.describe(loaded)["parameters"] == catalog.find("tiny").parameters
    assert quantize.bits(loaded) == quantize.bits(made)


def test_a_block_that_transformers_lacks_is_quantised_after_loading(tiny_folder):
    wide = QuantizeSpec(name="fp4", block=256)
    assert quantize.found(load.load_model(tiny_folder, dtype="float32", quantize=wide)) == wide.model_dump()


def test_compute_says_in_what_the_products_are_taken(tiny_folder):
    model = load.load_model(tiny_folder, dtype="float32", quantize=QuantizeSpec(name="nf4", compute="bfloat16"))
    assert quantize.found(model)["compute"] == "bfloat16"
    exact = laws.logits(load.load_model(tiny_folder, dtype="float32", quantize=NF4))
    assert 0 < float((laws.logits(model) - exact).abs().max()) < 0.1


def test_a_folder_that_is_quantised_already_stays_so(tiny_folder, tmp_path):
    model = load.load_model(tiny_folder, dtype="float32", quantize=NF4)
    shutil.copytree(tiny_folder, tmp_path / "own")
    model.save_pretrained(tmp_path / "own")
    again = load.load_model(tmp_path / "own", dtype="float32")
    assert quantize.found(again) == NF4.model_dump()
    assert torch.equal(laws.logits(again), laws.logits(model))
    assert not quantize.layers(again)["model.layers.0.mlp.up_proj"].support_avx512bf16_for_cpu
    with pytest.raises(SpecError, match="is quantised already"):
        load.load_model(tmp_path / "own", quantize=INT8)


def test_what_cannot_be_had_is_refused_before_loading(tiny_folder, monkeypatch):
    monkeypatch.setattr(load, "_from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with monkeypatch.context() as patch:
        patch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SpecError, match=r"needs bitsandbytes.*luthier\[quantize\]"):
            load.load_model(tiny_folder, quantize=NF4)
    with pytest.raises(SpecError, match="not proven on mps"):
        quantize.require(NF4, "mps")
    quantize.require(QuantizeSpec(), "mps")


# --- the same product everywhere ---------------------------------------------------------------------------------


def test_dequantised_is_the_same_model(asked):
    model = quantised(asked)
    before = laws.logits(model)
    plain = quantize.dequantised(model)
    assert torch.equal(laws.logits(plain), before)
    assert not quantize.layers(plain) and not any(hasattr(plain, mark) for mark in quantize.MARKS)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_training_and_answering_take_one_product(asked):
    """bitsandbytes' own int8 quantises activations when it answers, and its AVX512 path has no gradient."""
    model = quantised(asked)
    states = torch.randn(1, 5, 64)
    layer = model.model.layers[0].mlp.up_proj
    expected = F.linear(states, quantize.weight_of(layer, torch.float32))
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(states), expected)
        assert torch.equal(layer(states.clone().requires_grad_()).detach(), expected)
    if asked.name != "int8":
        assert layer.support_avx512bf16_for_cpu is False


def test_gradients_are_those_of_the_dequantised_matrix(asked):
    layer = quantised(asked).model.layers[0].mlp.down_proj
    layer.bias = torch.nn.Parameter(torch.randn(64))
    weight = quantize.weight_of(layer, torch.float32)
    states = torch.randn(2, 5, 96, requires_grad=True)
    upstream = torch.randn(2, 5, 64)
    (layer(states) * upstream).sum().backward()
    assert torch.allclose(states.grad, upstream @ weight, atol=1e-5)
    assert torch.allclose(layer.bias.grad, upstream.sum((0, 1)), atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("form", ["cascade", "dense"])
@pytest.mark.parametrize("recompute", [False, True])
def test_trees_equal_separate_rows(name, form, recompute, lora):
    """Loss and gradient of prefix-tree packs are those of separate rows on the same quantised matrices."""
    adapted = laws.attach(lora, quantised(KINDS[name]))
    laws.train(adapted, lora, steps=3)
    made = laws.rows(11)
    loss = laws._separately(adapted.model, made)
    expected = laws._gradients(adapted, loss)
    if recompute:
        recompute_activations(adapted.model)
        adapted.model.train()
    packed = laws._together(adapted.model, made, form)
    found = laws._gradients(adapted, packed)
    assert abs(float(packed.detach() - loss.detach())) <= laws.BOUND * abs(float(loss.detach()))
    assert float((found - expected).norm()) <= 10 * laws.BOUND * float(expected.norm())


def test_the_fused_step_leaves_quantised_layers_alone(lora):
    adapted = laws.attach(lora, quantised())
    wrapped = [m for m in adapted.model.modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == 21 and not any(isinstance(m.forward, functools.partial) for m in wrapped)
    plain = laws.attach(lora, network("llama"))
    assert any(isinstance(m.forward, functools.partial) for m in plain.model.modules() if hasattr(m, "lora_A"))
    assert fused.LoraLinear not in {type(m) for m in wrapped}


# --- methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("name", registry.names("methods"))
def test_every_method_works_on_a_quantised_base_or_says_why_not(name, base):
    model = quantised(KINDS[base])
    before = laws.logits(model)
    packed = {n: m.weight.data.clone() for n, m in quantize.layers(model).items()}
    try:
        method = registry.make("methods", {"name": name, "type": "vera"} if name == "peft" else name)
        adapted = laws.attach(method, model)
    except SpecError as error:
        assert "quantis" in str(error)
        assert torch.equal(laws.logits(model), before), "a refusal leaves the base as it was"
        return
    first = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    losses = laws.train(adapted, method, steps=4)
    assert losses[-1] < losses[0]
    plainly = laws.attach(method, quantize.dequantised(quantised(KINDS[base])))
    assert laws.train(plainly, method, steps=4) == pytest.approx(losses, abs=1e-3), "as on the dequantised base"
    assert any(not torch.equal(first[n], p) for n, p in adapted.trainable().items())
    with adapted.disabled():
        assert torch.equal(laws.logits(adapted.model), before)
    plain = adapted.detach()
    assert torch.equal(laws.logits(plain), before)
    assert quantize.found(plain) == KINDS[base].model_dump()
    assert all(torch.equal(m.weight.data, packed[n]) for n, m in quantize.layers(plain).items())


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("kind", sorted(door.OPEN))
def test_peft_types_equal_themselves_on_the_dequantised_base_or_are_refused(kind, base):
    """Read as numbers, packed int8 weights give no error on square matrices: only this comparison finds that out."""
    method = registry.make("methods", {"name": "peft", "type": kind.lower()})
    if kind not in quantize.PEFT_TYPES:
        with pytest.raises(SpecError):
            laws.attach(method, quantised(KINDS[base]))
        return
    answers = []
    for model in (quantised(KINDS[base]), quantize.dequantised(quantised(KINDS[base]))):
        adapted = laws.attach(method, model)
        laws.train(adapted, method, steps=3)
        answers.append(laws.logits(adapted.model))
    assert torch.allclose(*answers, atol=1e-4)
    assert not torch.equal(answers[0], laws.logits(quantised(KINDS[base])))


def test_merging_into_quantised_matrices_is_refused(lora):
    adapted = laws.attach(lora, quantised())
    with pytest.raises(SpecError, match="merging needs plain matrices"):
        adapted.merge()


def test_merged_into_the_dequantised_base_equals_attached(lora, tmp_path, asked):
    adapted = laws.attach(lora, quantised(asked))
    laws.train(adapted, lora)
    adapted.save(tmp_path)
    attached = laws.logits(adapted.model)
    merged = lora.load(quantize.dequantised(adapted.detach()), tmp_path).merge()
    assert torch.allclose(laws.logits(merged), attached, atol=1e-4)


def test_generation_is_the_models_own(lora, asked):
    """Cached keys and values, prompts side by side: the greedy answer of the plain forward."""
    from luthier.model.generate import generate

    adapted = laws.attach(lora, quantised(asked))
    laws.train(adapted, lora)
    prompts = [row.ids[: row.prompt_length] for row in laws.rows(5, 3)]
    answers = generate(adapted.model, prompts, decode=lambda ids: "", stop_ids={199}, max_new_tokens=5, batch_size=3)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token, logprob in zip(answer.ids, answer.logprobs, strict=False):
            table = torch.log_softmax(laws.logits(adapted.model, torch.tensor([ids]))[0, -1], -1)
            assert abs(float(table[token]) - logprob) < 1e-3
            ids.append(token)


# --- optimisers --------------------------------------------------------------------------------------------------


def parameters(*sizes: int) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(1)
    return {f"p{i}": torch.nn.Parameter(torch.randn(size)) for i, size in enumerate(sizes)}


def push(master: Master, made: dict[str, torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for p in made.values():
            p.grad = torch.randn_like(p)
        master.collect()
        master.step(1.0, 1e-2)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_moments_are_plain_tensors_that_bring_a_run_back_exactly(name):
    settings = TrainSpec(optimizer=name, weight_decay=0.1)
    groups = {"p1": {"lr_scale": 2.0}}
    whole, one = Master(made := parameters(5000, 4100, 7), settings, groups), parameters(5000, 4100, 7)
    push(whole, made, range(6))
    broken = Master(one, settings, groups)
    push(broken, one, range(3))
    state = {key: tensor.clone() for key, tensor in broken.state().items()}
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    resumed = Master(other := parameters(5000, 4100, 7), settings, groups)
    resumed.restore(state)
    push(resumed, other, range(3, 6))
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[key]), key
    assert all(torch.equal(made[key], other[key]) for key in made)


def test_eight_bit_moments_take_the_room_that_is_told_and_step_nearly_alike():
    whole, eight = (Master(parameters(40_000), TrainSpec(optimizer=name)) for name in ("adamw", "adamw8bit"))
    for name, master in (("adamw", whole), ("adamw8bit", eight)):
        kept = sum(t.nbytes for key, t in master.state().items() if key not in ("master", "optimiser_step"))
        assert kept / len(master) == pytest.approx(moments.BYTES[name], rel=1e-2)
        push(master, {place.name: place.parameter for place in master.places}, range(10))
    moved = float((whole.master - parameters(40_000)["p0"].detach()).norm())
    assert float((whole.master - eight.master).norm()) < 0.1 * moved


def test_a_state_of_another_optimiser_is_refused():
    state = Master(parameters(5000), TrainSpec(optimizer="adamw")).state()
    with pytest.raises(CheckpointError, match="does not fit"):
        Master(parameters(5000), TrainSpec(optimizer="adamw8bit")).restore(state)


def test_optimisers_that_cannot_run_are_refused_or_run_unpaged_and_say_so(monkeypatch):
    assert moments.require("adamw", "cpu") == moments.require("paged_adamw8bit", "cuda") == []
    (note,) = moments.require("paged_adamw8bit", "cpu")
    assert "runs as adamw8bit" in note
    with pytest.raises(SpecError, match="not on mps"):
        moments.require("adamw8bit", "mps")
    monkeypatch.setattr(moments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"adamw8bit needs bitsandbytes"):
        moments.require("adamw8bit", "cpu")
    assert "runs as adamw:" in moments.require("paged_adamw", "cpu")[0]


# --- a whole run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from luthier.flows.train import train

    folder = tmp_path_factory.mktemp("nf4")
    wishes = ["quantize=nf4", "train.optimizer=paged_adamw8bit", "model.dtype=float32", "train.max_steps=6"]
    notes: list[str] = []
    asked = spec.load(write_task(folder), wishes)
    train(asked, on_event=lambda event: notes.append(str(getattr(event, "text", event))))
    return store.Run(folder / "runs" / "task"), notes, folder, wishes


def test_a_run_records_its_quantisation_and_is_served_on_it(finished):
    from luthier.flows.answer import Tuned

    run, notes, _, _ = finished
    assert json.loads((run.adapter / "luthier.json").read_text())["quantize"] == NF4.model_dump()
    assert "on the base in nf4" in (run.adapter / "README.md").read_text()
    assert any("bits a weight" in note for note in notes) and any("runs as adamw8bit" in note for note in notes)
    assert store.read_json(run.report)["provenance"]["quantize"] == NF4.model_dump()
    tuned = Tuned(run)
    assert quantize.found(tuned.model) == NF4.model_dump()


def test_answers_of_a_quantised_base_are_not_those_of_a_plain_one(finished):
    from luthier.flows.train import train

    run, _, folder, wishes = finished
    keys = [store.read_json(run.predictions / "test" / "base.json")["key"]]
    train(spec.load(folder / "task.yaml", [*wishes, "quantize=none", "name=plain"]))
    plain = store.Run(folder / "runs" / "plain")
    keys.append(store.read_json(plain.predictions / "test" / "base.json")["key"])
    assert keys[0] != keys[1]
    assert json.loads((plain.adapter / "luthier.json").read_text())["quantize"] == {}


def test_an_interrupted_quantised_run_goes_on_exactly_and_not_on_another_base(finished, monkeypatch):
    from luthier.flows import train as flow
    from luthier.training.loop import Training

    run, _, folder, wishes = finished
    asked = spec.load(folder / "task.yaml", [*wishes, "name=broken", "train.save_every=1"])
    usual = Training.__iter__

    def killed(self):
        for step in usual(self):
            yield step
            if step.index == 4:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "__iter__", killed)
        flow.train(asked)
    with pytest.raises(CheckpointError, match="quantize"):
        flow.train(spec.load(folder / "task.yaml", [*wishes, "name=broken", "quantize=int8"]), resume=True)
    flow.train(asked, resume=True)
    broken = store.Run(folder / "runs" / "broken")
    name = "adapter_model.safetensors"
    assert (broken.adapter / name).read_bytes() == (run.adapter / name).read_bytes()


def test_export_folds_into_the_dequantised_base_and_says_so(finished, tmp_path):
    from luthier.flows.answer import Tuned
    from luthier.flows.export import export

    run, *_ = finished
    proof = export(run.folder, tmp_path / "merged")
    assert proof["base"] == "dequantised from nf4"
    assert proof["largest_difference"] < 1e-4
    merged = load.load_model(tmp_path / "merged", dtype="float32")
    assert not quantize.layers(merged)
    ids = torch.tensor([list(Tuned(run).prompt("I saw a red cup"))])
    assert torch.allclose(laws.logits(merged, ids), laws.logits(Tuned(run).model, ids), atol=1e-4)


# --- settings ----------------------------------------------------------------------------------------------------


def settings(**written):
    tree, faults = spec._resolve_aliases({"model": "tiny", "data": {"train": "rows.jsonl"}, **written}, {}, "")
    return spec.build(tree, faults=faults)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"quantize": "nf4"}, NF4),
        ({"quantize": None}, QuantizeSpec()),
        ({"load_in_4bit": True}, NF4),
        ({"load_in_4bit": True, "load_in_8bit": False}, NF4),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
         QuantizeSpec(name="fp4", double=False)),
        ({"load_in_8bit": True}, INT8),
        ({"load_in_4bit": False}, QuantizeSpec()),
        ({"quantization_bit": 4, "double_quantization": True}, NF4),
        ({"quantization_bit": 8}, INT8),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, QuantizeSpec(name="nf4", compute="bfloat16")),
    ],
)  # fmt: skip
def test_other_tools_settings_are_understood(written, expected):
    assert settings(**written).quantize == expected


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"quantize": "nf5"}, "did you mean 'nf4'"),
        ({"quantize": {"name": "nf4", "dubble": True}}, "did you mean 'double'"),
        ({"quantize": {"name": "int8", "block": 128}}, "is for nf4 and fp4"),
        ({"quantize": {"name": "nf4", "block": 100}}, "quantize.block"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "cannot all be"),
        ({"quantization_bit": 3}, "quantize.name"),
        ({"llm_int8_threshold": 6.0}, "weight-only"),
        ({"quantize": "nf4", "load_in_8bit": True}, "says again"),
        ({"train": {"optimizer": "adam8"}}, "train.optimizer"),
    ],
)
def test_what_cannot_be_is_refused_in_words(written, told):
    with pytest.raises(SpecError, match=told):
        settings(**written)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw_torch", "adamw"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("adamw_bnb_8bit", "adamw8bit"),
        ("adamw", "adamw"),
    ],
)
def test_optimisers_by_the_names_of_other_tools(name, expected):
    assert settings(optim=name).train.optimizer == expected


def test_overrides_speak_the_same_language(tmp_path):
    path = write_task(tmp_path)
    assert spec.load(path, ["load_in_4bit=true"]).quantize == NF4
    assert spec.load(path, ["quantize=fp4", "quantize.double=false"]).quantize == QuantizeSpec(name="fp4", double=False)
    again = tmp_path / "again.yaml"
    again.write_text(spec.dump(spec.load(path, ["quantize=nf4"])))
    assert spec.load(again).quantize == NF4


# --- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_in_nf4_has_the_published_bits_and_learns():
    folder = catalog.locate("smollm2-135m")
    model = load.load_model(folder, dtype="float32", device="cpu", quantize=NF4)
    told = quantize.bits(model)
    assert told.matrices == pytest.approx(4.127, abs=1e-3)
    assert told.whole == pytest.approx(10.01, abs=0.02)  # the tied embedding, 28.3 of 134.5 million, stays in float32
    assert told.parameters == catalog.find("smollm2-135m").parameters
    method = registry.make("methods", {"name": "lora", "rank": 4})
    adapted = method.attach(model, seed=0)
    losses = laws.train(adapted, method, steps=20, rate=1e-3)
    assert losses[-1] < 0.5 * losses[0]
