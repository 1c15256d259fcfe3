"""Methods that train some of the base's own weights: what is chosen, what is kept, what is refused."""

from __future__ import annotations

import copy
import functools
import json

import laws
import pytest
import torch
from networks import VOCABULARY, network
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from luthier import registry
from luthier.adapt import blocks
from luthier.adapt.folder import CONFIG, WEIGHTS
from luthier.adapt.largest import largest
from luthier.errors import CheckpointError, SpecError, TrainingError, UsageError
from luthier.model import tiny
from luthier.model.load import load_model
from luthier.records import Loss
from luthier.text.tokenizer import Tokenizer

SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
ALL = 134_515_008
EMBEDDING = 49_152 * 576
MATRICES = 106_168_320  # entries of the seven matrices of thirty blocks


def made(name, **options):
    return registry.make("methods", {"name": name, **options})


def fresh(name, base, **options):
    return laws.attach(made(name, **options), base)


@functools.cache
def _tied_llama():
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)


def tied_llama(kind="llama"):
    assert kind == "llama"
    return copy.deepcopy(_tied_llama())


def smollm2(*, tied=True):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SMOLLM2, tie_word_embeddings=tied))


def size_of(adapted):
    return sum(parameter.numel() for parameter in adapted.trainable().values())


def rewrite(folder, **changed):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changed}))


@pytest.mark.parametrize(
    ("name", "options", "tied", "count"),
    [
        ("full", {}, True, ALL),
        ("full", {}, False, ALL + EMBEDDING),
        ("layernorm", {}, True, 35_136),
        ("bitfit", {}, True, 155_520),
        ("bitfit", {"linears": ["q_proj", "v_proj"]}, True, 30 * (576 + 192)),
        ("head", {}, True, EMBEDDING),
        ("head", {}, False, EMBEDDING),
        ("head", {"final_norm": True}, True, EMBEDDING + 576),
        ("embeddings", {}, True, EMBEDDING),
        ("embeddings", {"untie": True}, True, EMBEDDING),
        ("embeddings", {"tokens": [3, 1, 3]}, True, 2 * 576),
        ("layers", {}, True, 2 * (ALL - EMBEDDING - 576) // 30),
        ("layers", {"last": 1}, True, (ALL - EMBEDDING - 576) // 30),
        ("layers", {"indices": [0, "2-4"]}, True, 4 * (ALL - EMBEDDING - 576) // 30),
        ("layers", {"names": ["q_proj"]}, True, 30 * 576 * 576),
        ("fishmask", {}, True, MATRICES // 200),
        ("diff_pruning", {}, True, 2 * MATRICES),
    ],
)
def test_counts_on_the_shapes_of_smollm2(name, options, tied, count):
    """Published counts (methods reference, section 1) where there are any; FishMask rounds matrix by matrix."""
    base = smollm2(tied=tied)
    assert sum(p.numel() for p in base.parameters()) == ALL + (0 if tied else EMBEDDING)
    found = size_of(made(name, **options).attach(base, seed=0))
    assert abs(found - count) <= (210 if name == "fishmask" else 0)


def test_sparse_files_are_small():
    base = smollm2()
    assert made("fishmask").attach(base, seed=0).saved_bytes() == pytest.approx(8 * MATRICES / 200, rel=1e-3)
    assert made("diff_pruning").attach(smollm2(), seed=0).saved_bytes() == 8 * (MATRICES // 200)


@pytest.mark.parametrize("name", ["full", "fishmask", "diff_pruning", "bitfit", "head"])
def test_saved_bytes_are_those_of_the_file(name, tmp_path):
    adapted = fresh(name, network("llama"))
    adapted.save(tmp_path)
    assert sum(t.nbytes for t in load_file(tmp_path / WEIGHTS).values()) == adapted.saved_bytes()


VARIANTS = [
    ("layers", {"last": 1, "names": ["*.mlp.up_proj"]}),
    ("layers", {"indices": [0, "1-2"]}),
    ("bitfit", {"add": "always", "linears": ["q_proj", "down_proj"]}),
    ("head", {"final_norm": True}),
    ("embeddings", {"untie": True}),
    ("embeddings", {"tokens": [5, 9, 40, 77, 3, 8, 120, 44]}),
    ("fishmask", {"share": 0.05, "samples": 3, "linears": ["*.mlp.*"]}),
    ("diff_pruning", {"share": 0.05, "linears": ["*.mlp.*"]}),
]
PLAIN = [("full", {}), ("head", {}), ("embeddings", {}), ("fishmask", {}), ("diff_pruning", {})]
CASES = [*((*case, False) for case in VARIANTS), *((*case, True) for case in (*VARIANTS, *PLAIN))]


@pytest.mark.parametrize(("name", "options", "tied"), CASES, ids=str)
def test_variants_meet_the_laws(name, options, tied, tmp_path, monkeypatch):
    """On a base whose head is tied to the embedding too."""
    if tied:
        monkeypatch.setattr(laws, "network", tied_llama)
    make = functools.partial(made, name, **options)
    laws.fresh_changes_nothing(make)
    laws.disabled_and_detached_are_the_base(make)
    laws.merged_equals_attached(make)
    laws.trees_equal_separate_rows(make, recompute=True)
    laws.saved_and_loaded_is_the_same(make, tmp_path)
    if not tied:
        laws.only_the_adapter_learns(make)
        laws.it_learns(make)
        laws.it_survives_a_kill(make, tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [("full", {}), ("layers", {}), ("layernorm", {}), ("bitfit", {}), ("head", {"final_norm": True}),
     ("embeddings", {}), ("embeddings", {"untie": True}), ("embeddings", {"tokens": [5, 9]}), ("fishmask", {}),
     ("diff_pruning", {})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("base", [tied_llama, functools.partial(network, "llama")], ids=["tied", "untied"])
def test_a_merged_model_is_a_plain_folder(name, options, base, tmp_path):
    """Saved and loaded, it answers as it did attached; the configuration says what was added or untied."""
    method, model = made(name, **options), base()
    tied = model.config.tie_word_embeddings
    adapted = laws.attach(method, model)
    laws.train(adapted, method)
    attached = laws.logits(adapted.model)
    merged = adapted.merge()
    assert torch.allclose(laws.logits(merged), attached, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(laws.logits(again.eval()), laws.logits(merged))
    untied = name == "head" or options.get("untie", False)
    assert again.config.tie_word_embeddings == (tied and not untied)
    assert again.config.attention_bias == again.config.mlp_bias == (name == "bitfit")


def test_biases_that_a_flag_brings_along_are_zero(tmp_path):
    method = made("bitfit", linears=["q_proj"])
    adapted = laws.attach(method, network("llama"))
    laws.train(adapted, method)
    attached = laws.logits(adapted.model)
    adapted.merge().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.attention_bias and not again.config.mlp_bias
    assert not again.model.layers[0].self_attn.o_proj.bias.any()
    assert again.model.layers[0].self_attn.q_proj.bias.any()
    assert torch.allclose(laws.logits(again), attached, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_biases_without_a_place_in_the_configuration_are_not_merged(kind, tmp_path):
    with pytest.raises(UsageError, match="down_proj, gate_proj, up_proj"):
        fresh("bitfit", network(kind)).merge()
    attention = fresh("bitfit", network(kind), linears=["*.self_attn.*"])
    attention.merge().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.attention_bias


def test_bitfit_says_what_it_examined():
    with pytest.raises(SpecError, match=r"21 linear layers examined \(down_proj, .*v_proj\)"):
        fresh("bitfit", network("llama"), add="never")
    own = fresh("bitfit", network("gpt_neox"))
    assert own.added == [] and all(name.endswith(".bias") for name in own.trainable())
    assert made("bitfit").groups(["x.bias"]) == {"x.bias": {"weight_decay": 0.0}}


def test_untying_leaves_no_trace():
    base = tied_llama()
    keys, embedding = dict(base.all_tied_weights_keys), base.model.embed_tokens.weight
    adapted = fresh("head", base)
    assert not blocks.tied(base) and base.model.embed_tokens.weight is embedding
    assert "lm_head.weight" in adapted.trainable() and not base.config.tie_word_embeddings
    plain = adapted.detach()
    assert blocks.tied(plain) and plain.config.tie_word_embeddings and plain.all_tied_weights_keys == keys
    assert plain.lm_head.weight is embedding


def test_a_head_does_not_change_inputs():
    method, base = made("head"), tied_llama()
    before = base.model(laws.IDS).last_hidden_state
    adapted = laws.attach(method, base)
    laws.train(adapted, method)
    assert torch.equal(base.model(laws.IDS).last_hidden_state, before)


def test_full_tuning_keeps_one_copy_and_the_tie():
    base = tied_llama()
    own = {name: p.data_ptr() for name, p in base.named_parameters()}
    adapted = fresh("full", base)
    assert blocks.tied(base) and "lm_head.weight" not in adapted.trainable()
    assert {name: kept.data_ptr() for name, kept in adapted._aside.items()} == own
    with adapted.disabled():
        assert {name: p.data_ptr() for name, p in base.named_parameters()} == own


@pytest.mark.parametrize(
    ("options", "told"),
    [({"names": ["q_porj"]}, "q_proj"), ({"names": ["*.mlp.*", "transformer.h"]}, "nearest|there are"),
     ({"indices": [7]}, "0-2"), ({"indices": ["2-1", "x"]}, "neither a number nor a range"), ({"last": 9}, "3 blocks")],
)  # fmt: skip
def test_layers_that_are_not_there(options, told):
    base = network("llama")
    with pytest.raises(SpecError, match=told):
        fresh("layers", base, **options)
    assert not any(p.requires_grad for p in base.parameters())


def test_a_pattern_names_modules_or_parameters():
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(blocks.matches(name, p) for p in ("*.mlp.*", "up_proj", "mlp", "model.layers.0", "up_proj.weight", name))
    assert not any(blocks.matches(name, p) for p in ("up", "model.layers.1", "layers.1", "weight.up_proj", "proj"))


@pytest.mark.parametrize("tokens", [[VOCABULARY], [-1], ["hello"]])
def test_tokens_that_are_not_there(tokens):
    with pytest.raises(SpecError, match=r"method.tokens"):
        fresh("embeddings", network("llama"), tokens=tokens)


def test_tokens_by_text(tmp_path):
    base = load_model(tiny.write(tmp_path / "tiny"), dtype="float32", device="cpu")
    encode = Tokenizer.from_folder(tmp_path / "tiny").encode
    adapted = fresh("embeddings", base, tokens=["<|im_end|>", "price", 7])
    wanted = {*encode("<|im_end|>"), *encode("price"), 7}
    (rows,) = adapted.trainable().values()
    assert len(encode("<|im_end|>")) == 1
    assert torch.equal(rows, adapted.detach().get_input_embeddings().weight[sorted(wanted)])


def by_hand(base, count):
    """The largest means of squared gradients, by autograd on each row's loss."""
    layers = {f"{n}.weight": m for block in blocks.blocks(base) for n, m in block.linears.items()}
    parameters = [layer.weight.requires_grad_(True) for layer in layers.values()]
    squares = [torch.zeros_like(p) for p in parameters]
    for loss in laws.TestEvidence(base).losses(4):
        for total, grad in zip(squares, torch.autograd.grad(loss.sum, parameters), strict=True):
            total += grad**2
    for parameter in parameters:
        parameter.requires_grad_(False)
    last = torch.cat([s.flatten() for s in squares]).topk(count).values[-1]
    return {n: (s >= last).flatten().nonzero()[:, 0] for n, s in zip(layers, squares, strict=True)}


def test_the_mask_is_chosen_by_fisher_information():
    base = network("llama")
    total = sum(m.weight.numel() for block in blocks.blocks(base) for m in block.linears.values())
    expected = by_hand(base, round(0.01 * total))
    adapted = fresh("fishmask", base, share=0.01, samples=4)
    assert size_of(adapted) == round(0.01 * total)
    found = {matrix.name: matrix.index for matrix in adapted.matrices}
    assert found.keys() == {name for name, index in expected.items() if len(index)}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())


def test_nothing_but_the_mask_changes():
    method, base = made("fishmask", share=0.01), network("llama")
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = laws.attach(method, base)
    laws.train(adapted, method)
    changed = {name: (tensor != kept[name]).sum() for name, tensor in adapted.merge().state_dict().items()}
    assert 0 < sum(map(int, changed.values())) <= size_of(adapted)


def test_fishmask_wants_rows():
    class Empty:
        total_steps = 1

        def losses(self, count):
            return iter(())

    class Breaks:
        total_steps = 1

        def losses(self, count):
            yield Loss(base.lm_head.weight.sum() * 0 + base(laws.IDS).logits.sum(), 1.0)
            raise RuntimeError("no more")

    base = network("llama")
    with pytest.raises(TrainingError, match="none"):
        made("fishmask").attach(base, seed=0)
    with pytest.raises(TrainingError, match="no training rows"):
        made("fishmask").attach(base, seed=0, evidence=Empty())
    with pytest.raises(RuntimeError, match="no more"):
        made("fishmask").attach(base, seed=0, evidence=Breaks())
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())


def test_a_restored_mask_is_the_old_one():
    base = network("llama")
    adapted = fresh("fishmask", base, share=0.01)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.fill_(0.5)
    other = {name: torch.arange(len(index), dtype=torch.int32) for name, index in adapted.state().items()}
    laws.logits(adapted.model)
    adapted.restore(other)
    laws.logits(adapted.model)
    for matrix in adapted.matrices:
        changed = (matrix.module.weight != network("llama").get_parameter(matrix.name)).flatten().nonzero()[:, 0]
        assert torch.equal(changed, other[f"{matrix.name}.index"].long())


@pytest.mark.parametrize("count", [1, 7, 500, 999, 1000])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "tiny"])
def test_largest_is_exact(count, kind):
    generator = torch.Generator().manual_seed(count)
    parts = [torch.randn(n, generator=generator) for n in (300, 1, 500, 199)]
    if kind == "ties":
        parts = [part.round() for part in parts]
    elif kind != "normal":
        parts = [part * (0.0 if kind == "zeros" else 1e-42) for part in parts]
    found = largest(parts.__getitem__, len(parts), count)
    assert sum(map(len, found)) == count
    assert all(bool((index[1:] > index[:-1]).all()) for index in found)
    taken = torch.cat([part[index] for part, index in zip(parts, found, strict=True)]).abs().sort().values
    assert torch.equal(taken, torch.cat(parts).abs().sort().values[-count:])


def pruned(steps=60, **options):
    """Diff pruning after a run of `steps`, on the toy of the laws."""
    method = made("diff_pruning", share=0.02, **options)
    adapted = laws.attach(method, network("llama"))
    laws.train(adapted, method, steps=steps, rate=5e-3)
    return adapted


def test_diff_pruning_trains_everything_and_changes_the_target_share(tmp_path):
    adapted = pruned()
    kept = network("llama").state_dict()
    total = sum(matrix.own.numel() for matrix in adapted.matrices)
    assert size_of(adapted) == 2 * total
    adapted.save(tmp_path)
    entries = sum(len(t) for name, t in load_file(tmp_path / WEIGHTS).items() if name.endswith(".values"))
    assert entries == int(0.02 * total)
    merged = adapted.merge().state_dict()
    changed = sum(int((tensor != kept[name]).sum()) for name, tensor in merged.items())
    assert 0 < changed <= entries


def test_gates_close_under_pressure():
    @torch.no_grad()
    def opened(adapted):
        return sum(float(matrix.opened()) for matrix in adapted.matrices) / adapted.entries

    assert opened(pruned(pressure=100.0)) < 0.1
    assert opened(pruned(pressure=1e-6)) > 0.5


def test_learnt_gates_choose_better_than_size_alone():
    """Without pressure all gates stay open, and what is kept are the differences that Adam happened to make largest."""

    def loss(pressure):
        return float(pruned(pressure=pressure).model(input_ids=laws.IDS, labels=laws.IDS).loss.detach())

    assert loss(100.0) < loss(1e-6)


def test_the_mask_is_fixed_late_in_the_run_and_survives_a_kill():
    method = made("diff_pruning", share=0.02)
    adapted = laws.attach(method, network("llama"))
    assert bool((adapted.state()["mask"] == -1).all())
    laws.train(adapted, method, steps=10, rate=5e-3)
    chosen = [matrix.kept.clone() for matrix in adapted.matrices]
    state = adapted.state()
    assert len(state["mask"]) == sum(map(len, chosen)) == int(0.02 * adapted.entries)
    laws.train(adapted, method, steps=4, rate=5e-3)
    assert all(torch.equal(matrix.kept, kept) for matrix, kept in zip(adapted.matrices, chosen, strict=True))
    other = laws.attach(method, network("llama"))
    other.restore(state)
    assert all(torch.equal(matrix.kept, kept) for matrix, kept in zip(other.matrices, chosen, strict=True))
    assert other.penalty() is None


def test_noise_follows_from_seed_and_step_alone():
    def noise(seed, done):
        adapted = made("diff_pruning").attach(network("llama"), seed=seed)
        adapted.stepped(done, 10, {})
        adapted.model.train()
        torch.manual_seed(done)
        adapted.refresh()
        return adapted.matrices[0].noise

    assert torch.equal(noise(1, 3), noise(1, 3))
    assert not torch.equal(noise(1, 3), noise(1, 4))
    assert not torch.equal(noise(1, 3), noise(2, 3))


def test_packs_of_one_step_see_the_same_gates():
    """Rows together and apart have the same gradient in the midst of training, noise and all."""
    method = made("diff_pruning")
    adapted = laws.attach(method, network("llama"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in adapted.matrices:
            matrix.change.normal_(std=0.02, generator=generator)
    adapted.stepped(3, 100, {})
    adapted.model.train()
    rows = laws.rows(11)
    expected = laws._gradients(adapted, laws._separately(adapted.model, rows))
    assert adapted.matrices[0].noise is not None
    found = laws._gradients(adapted, laws._together(adapted.model, rows, "cascade"))
    assert float((found - expected).norm()) <= 2e-4 * float(expected.norm())


@pytest.mark.parametrize("noisy", [False, True])
def test_gradients_of_gates_are_those_of_autograd(noisy):
    """Against the formula written out with torch's own operations."""
    from luthier.adapt import hard_concrete as hc

    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 4, bias=False).requires_grad_(False)
    matrix = hc.Gated("w", layer)
    with torch.no_grad():
        matrix.change.normal_()
        matrix.gates.normal_(std=3.0)
    if noisy:
        matrix.draw(7)
    matrix.write()
    upstream = torch.randn(4, 5)
    (matrix.weight() * upstream).sum().backward()
    found = [p.grad.clone() for p in matrix.parameters().values()]

    soft = torch.sigmoid((matrix.gates + matrix.noise.float()) / hc.HEAT) if noisy else torch.sigmoid(matrix.gates)
    gates = (soft * (hc.HIGH - hc.LOW) + hc.LOW).clamp(0, 1)
    weight = matrix.own + gates * matrix.change
    expected = torch.autograd.grad((weight * upstream).sum(), list(matrix.parameters().values()))
    assert torch.allclose(matrix.changed, weight, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_half_precision_round_trip(tmp_path):
    """Values are kept in the dtype that computed; a sparse change stays float32 and is rounded once."""
    for name in ("full", "fishmask", "diff_pruning", "bitfit", "head"):
        folder = tmp_path / name
        folder.mkdir()
        method, base = made(name), network("llama").bfloat16()
        before = laws.logits(base)
        adapted = laws.attach(method, base)
        laws.train(adapted, method)
        adapted.save(folder)
        again = method.load(network("llama").bfloat16(), folder)
        assert torch.equal(laws.logits(again.model), laws.logits(adapted.model)), name
        assert torch.equal(laws.logits(adapted.detach()), before), name


def saved(name, folder, base=None, **options):
    fresh(name, base or network("llama"), **options).save(folder)
    return folder


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"names": ["model.layers.0.nothing"]}, "no parameter of this base"), ({"names": "model.norm.weight"}, "list of names"),
     ({"names": ["model.norm.weight", "model.norm.weight"]}, "listed twice"), ({"names": []}, "is empty"),
     ({"names": [7]}, "list of names"), ({"added": ["model.norm.bias"]}, "cannot be added"),
     ({"added": ["model.layers.0.mlp.up_proj.weight"]}, "cannot be added"), ({"untied": True}, "not tied"),
     ({"untied": "yes"}, "true or false"), ({"names": ["lm_head.weight", "model.norm.weight"]}, "not in the file"),
     ({"architecture": "GPTNeoXForCausalLM"}, "GPTNeoXForCausalLM"), ({"auto_mapping": {"x": "y"}}, "auto_mapping")],
)  # fmt: skip
def test_hostile_folders_of_weights(changed, told, tmp_path):
    saved("head", tmp_path)
    rewrite(tmp_path, **changed)
    base = network("llama")
    kept = set(base.state_dict())
    with pytest.raises(CheckpointError, match=told):
        made("head").load(base, tmp_path)
    assert set(base.state_dict()) == kept and not any(p.requires_grad for p in base.parameters())


def test_a_tied_head_is_no_parameter_of_its_own(tmp_path):
    saved("head", tmp_path, tied_llama())
    rewrite(tmp_path, untied=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: is no parameter"):
        made("head").load(tied_llama(), tmp_path)


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [(lambda t: t[0].copy_(-1), "outside 0-6143"), (lambda t: t[-1:].fill_(6144), "outside 0-6143"),
     (lambda t: t[1:2].copy_(t[:1]), "twice or out of order"), (lambda t: t.copy_(t.flip(0)), "twice or out of order"),
     (lambda t: t.long(), "32-bit positions"), (lambda t: t.float(), "32-bit positions")],
)  # fmt: skip
def test_hostile_positions(spoil, told, tmp_path):
    saved("fishmask", tmp_path, linears=["layers.0.mlp.up_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    changed = spoil(tensors[f"{NAME}.index"])
    tensors[f"{NAME}.index"] = changed if changed.shape == tensors[f"{NAME}.index"].shape else tensors[f"{NAME}.index"]
    save_file(tensors, tmp_path / WEIGHTS)
    base = network("llama")
    with pytest.raises(CheckpointError, match=told):
        made("fishmask").load(base, tmp_path)
    assert torch.equal(laws.logits(base), laws.logits(network("llama")))


@pytest.mark.parametrize(
    ("matrices", "told"),
    [({"lm_head.weight": 3}, "no matrix"), ({NAME: 10**9}, "announces"), ({NAME: True}, "announces"),
     ({NAME: 0}, "announces"), ([NAME], "no matrices"), ({}, "no matrices")],
)  # fmt: skip
def test_hostile_counts(matrices, told, tmp_path):
    saved("fishmask", tmp_path)
    rewrite(tmp_path, matrices=matrices)
    with pytest.raises(CheckpointError, match=told):
        made("fishmask").load(network("llama"), tmp_path)


@pytest.mark.parametrize("indices", [[-1, 9], [5, VOCABULARY], [5, 5], "5", None])
def test_hostile_tokens(indices, tmp_path):
    saved("embeddings", tmp_path, tokens=[5, 9])
    rewrite(tmp_path, token_indices=indices)
    with pytest.raises(CheckpointError, match="tokens are refused"):
        made("embeddings").load(network("llama"), tmp_path)


@pytest.mark.parametrize("name", ["full", "layers", "fishmask", "diff_pruning"])
def test_quantised_matrices_are_refused(name):
    base = network("llama")
    layer = base.model.layers[2].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(SpecError, match="quantised"):
        fresh(name, base)
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("name", ["layernorm", "bitfit", "head", "embeddings"])
def test_methods_that_leave_matrices_alone_take_quantised_ones(name):
    base = network("llama")
    layer = base.model.layers[2].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    assert all(p.is_floating_point() for p in fresh(name, base).trainable().values())
