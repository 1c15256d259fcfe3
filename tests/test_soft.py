"""Soft prompts: the laws for every variant and family, plain calls, generation, folders of strangers and of PEFT."""

from __future__ import annotations

import functools
import json
import warnings

import laws
import pytest
import torch
from networks import KINDS, VOCABULARY, WINDOW, network
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from luthier import registry
from luthier.adapt import prompts
from luthier.adapt.folder import CONFIG, WEIGHTS
from luthier.errors import CheckpointError, ModelError, SpecError
from luthier.model.attention import Tree, recompute_activations, refuse_sharing
from luthier.model.batch import Batch
from luthier.model.generate import generate
from luthier.model.logprob import logprobs
from luthier.model.proof import prove_sharing
from luthier.model.soft import SOFT, soft_of
from luthier.records import Rendered
from luthier.text.pack import plan

VARIANTS = {
    "one token": {"name": "prompt", "tokens": 1},
    "noise": {"name": "prompt", "init": "random"},
    "one pair": {"name": "prefix", "tokens": 1},
    "noisy prefix": {"name": "prefix", "init": "random"},
    "projection": {"name": "prefix", "projection": 24, "tokens": 8},
    "noisy projection": {"name": "prefix", "projection": 24, "init": "random"},
    "lstm": {"name": "p_tuning", "encoder": "lstm", "width": 16},
    "narrow mlp": {"name": "p_tuning", "width": 24, "tokens": 5},
    "rank 3": {"name": "multitask_prompt", "rank": 3},
    "noisy product": {"name": "multitask_prompt", "init": "random"},
}
METHODS = ("prompt", "prefix", "p_tuning", "multitask_prompt")
LONG = WINDOW + 5  # a prompt that a sliding window cannot see whole
FAMILIES = (*KINDS, "mistral")


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def make(request):
    return functools.partial(registry.make, "methods", request.param)


def attached(kind="llama", seed=0, base=None, **options):
    base = network(kind) if base is None else base
    return registry.make("methods", options).attach(base, seed=seed)


def first_ids(model, tokens, seed=0):
    """The vocabulary's tokens that a fresh prompt of this seed starts as."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return prompts.draw_ids(model, tokens)


def random_ids(rows, tokens, seed=1):
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the shelf's laws, for every variant


def test_variants_learn(make):
    laws.it_learns(make)
    laws.only_the_adapter_learns(make)


def test_variants_leave_the_base_alone(make):
    laws.disabled_and_detached_are_the_base(make)
    laws.first_values_come_from_the_seed_alone(make)


def test_variants_are_saved_whole(make, tmp_path):
    for name in ("own", "peft"):
        (tmp_path / name).mkdir()
    laws.saved_and_loaded_is_the_same(make, tmp_path / "own")
    laws.peft_alone_loads_it_or_names_luthier(make, tmp_path / "peft")


def test_variants_survive_a_kill(make, tmp_path):
    laws.it_survives_a_kill(make, tmp_path)


def test_variants_are_exact_in_trees(make):
    laws.trees_equal_separate_rows(make)
    laws.trees_equal_separate_rows(make, form="dense", recompute=True)


# ---------------------------------------------------------------- trees, family by family


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("form", "recompute"), [("cascade", False), ("dense", True)])
@pytest.mark.parametrize("options", [{"name": "prompt"}, {"name": "prefix"}, {"name": "prompt", "tokens": LONG},
                                     {"name": "prefix", "tokens": LONG}], ids=str)  # fmt: skip
def test_trees_are_exact_in_every_family(kind, form, recompute, options):
    laws.trees_equal_separate_rows(
        functools.partial(registry.make, "methods", options), kind, form=form, recompute=recompute
    )


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("layout", ["one row", "rows apart", "several roots"])
def test_every_layout_of_a_pack_is_exact(kind, name, layout):
    adapted = attached(kind, name=name, tokens=6)
    made = laws.rows(5)[: 1 if layout == "one row" else 7]
    packs = plan(made, budget=4096, share=layout != "rows apart")
    assert layout == "one row" or any((pack.parents == -1).sum() > 1 for pack in packs)
    loss = -sum((logprobs(adapted.model, b) * b.target_weights).sum() for b in map(Batch.of, packs))
    oracle = laws._separately(adapted.model, made)
    assert abs(float((loss - oracle).detach())) <= laws.BOUND * float(oracle.detach())
    expected = laws._gradients(adapted, oracle)
    assert float((laws._gradients(adapted, loss) - expected).norm()) <= 10 * laws.BOUND * float(expected.norm())


def test_a_rooted_tree_is_the_tree_of_rows_with_that_beginning():
    k, made = 6, laws.rows(3)
    root = tuple(range(100, 100 + k))
    longer = [Rendered((*root, *r.ids), (0.0,) * k + r.weights, k + r.prompt_length, r.example_id) for r in made]
    (bare,), (whole,) = plan(made, budget=4096), plan(longer, budget=4096)
    rooted, expected = Tree.of(bare).rooted(k), Tree.of(whole)
    assert (rooted.size, rooted.deepest) == (expected.size, expected.deepest)
    assert torch.equal(rooted.positions, expected.positions)
    for window in (None, 4, 30):
        assert torch.equal(rooted.mask(window), expected.mask(window))
    assert Tree.of(bare).root is None


def test_half_precision_stays_close_and_is_saved_as_it_is_used(tmp_path):
    made = laws.rows(4)
    for name in METHODS:
        adapted = attached(base=network("llama").to(torch.bfloat16), name=name)
        (pack,) = plan(made, budget=4096)
        found = logprobs(adapted.model, Batch.of(pack)).detach()
        whole = attached(name=name)
        expected = logprobs(whole.model, Batch.of(pack)).detach()
        assert float((found - expected).abs().mean()) < 0.1
        folder = tmp_path / name
        folder.mkdir()
        adapted.save(folder)
        again = registry.make("methods", name).load(network("llama").to(torch.bfloat16), folder)
        assert torch.equal(laws.logits(again.model), laws.logits(adapted.model))
        assert load_file(folder / WEIGHTS)["prompt_embeddings"].dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_the_guard_lets_prompted_models_pass(name):
    assert prove_sharing(attached("gemma3", name=name).model, laws.rows(6)) == ""


# ---------------------------------------------------------------- what a fresh prompt says


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["prompt", "prefix", "multitask_prompt"])
@pytest.mark.parametrize("tokens", [3, LONG])
def test_a_fresh_prompt_says_what_its_tokens_say(kind, name, tokens):
    """The base's own answer to the same tokens, written out, is the oracle: positions, rotation and windows included."""
    base = network(kind)
    ids = random_ids(2, 30)
    spelt = torch.cat([first_ids(base, tokens).expand(2, -1), ids], 1)
    expected = laws.logits(base, spelt)[:, tokens:]
    adapted = attached(base=base, name=name, tokens=tokens)
    assert torch.allclose(laws.logits(adapted.model, ids), expected, atol=1e-4)
    assert not torch.allclose(laws.logits(adapted.detach(), ids), expected, atol=1e-2)


def test_a_projection_starts_at_the_same_prefix():
    projected = attached(name="prefix", projection=12)
    assert torch.equal(laws.logits(projected.model), laws.logits(attached(name="prefix").model))


@pytest.mark.parametrize("name", ["prompt", "prefix", "multitask_prompt"])
def test_a_text_can_be_the_beginning(name, tiny_models):
    from luthier.model.load import load_model
    from luthier.text.tokenizer import Tokenizer

    folder = next(iter(tiny_models.values()))
    said = Tokenizer.from_folder(folder).encode("Answer in French:")
    tokens = len(said) + 2
    base = load_model(folder, dtype="float32", device="cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    spelt = torch.tensor([[*said, *said[:2], *ids[0].tolist()]])
    expected = laws.logits(base, spelt)[:, tokens:]
    adapted = attached(base=base, name=name, init="text", text="Answer in French:", tokens=tokens)
    assert torch.allclose(laws.logits(adapted.model, ids), expected, atol=1e-4)
    base = adapted.detach()
    with pytest.raises(SpecError, match=f"tokens: {len(said)}"):
        attached(base=base, name=name, init="text", text="Answer in French:", tokens=len(said) - 1)
    assert not hasattr(base, SOFT)


def test_a_text_needs_a_tokenizer_and_its_init():
    with pytest.raises(SpecError, match="tokenizer"):
        attached(name="prompt", init="text", text="hello")
    for options in ({"init": "text"}, {"text": "hello"}):
        with pytest.raises(SpecError, match="go together"):
            registry.make("methods", {"name": "prompt", **options})


# ---------------------------------------------------------------- direct calls of the model


@pytest.fixture(params=["prompt", "prefix"])
def pair(request):
    """A prompted model, and a function that gives the base's logits for rows with the prompt's tokens written out."""
    base, k = network("llama"), 5
    written = first_ids(base, k)
    model = attached(name=request.param, tokens=k).model

    def oracle(ids, mask=None):
        spelt = torch.cat([written.expand(len(ids), -1), ids], 1)
        seen = None if mask is None else F.pad(mask, (k, 0), value=1)
        with torch.no_grad():
            return base(input_ids=spelt, attention_mask=seen).logits[:, k:]

    return model, oracle


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches(pair, side):
    model, oracle = pair
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, -4:] = mask[1, -7:] = 0
    mask = mask if side == "right" else mask.flip(1)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(found[mask.bool()], oracle(ids, mask)[mask.bool()], atol=1e-5)


@torch.no_grad()
def test_other_ways_to_ask_give_the_same(pair):
    model, oracle = pair
    ids = random_ids(2, 9)
    expected = oracle(ids)
    embedded = model.get_input_embeddings()(ids)
    ways = [
        model(ids),
        model(ids, torch.ones_like(ids)),
        model(inputs_embeds=embedded),
        model(input_ids=ids, position_ids=torch.arange(9)[None]),
        model(input_ids=ids, use_cache=False),
        model(input_ids=ids, output_hidden_states=True),
        model(input_ids=ids, output_attentions=None, labels=None),
    ]
    assert all(torch.allclose(way.logits, expected, atol=1e-5) for way in ways)
    assert {state.shape[1] for state in ways[5].hidden_states} == {9}
    assert torch.allclose(model(input_ids=ids, return_dict=False)[0], expected, atol=1e-5)
    assert torch.allclose(model(input_ids=ids, logits_to_keep=2).logits, expected[:, -2:], atol=1e-5)
    some = torch.tensor([1, 4, 8])
    assert torch.allclose(model(input_ids=ids, logits_to_keep=some).logits, expected[:, some], atol=1e-5)


def test_the_loss_is_that_of_the_logits_it_returns(pair):
    """With and without a prompt the first token of a row is given, not asked for."""
    model, _ = pair
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(input_ids=ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert abs(float((out.loss - expected).detach())) < 1e-5


@torch.no_grad()
def test_a_cache_is_gone_on_with(pair):
    model, oracle = pair
    ids = random_ids(2, 10)
    expected = oracle(ids)
    first = model(input_ids=ids[:, :6], use_cache=True)
    rest = model(
        input_ids=ids[:, 6:],
        cache=first.cache,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(6, 10)[None],
        use_cache=True,
    )
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), expected, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_transformers_own_generation_knows_the_prompt(kind, name):
    model = attached(kind, name=name, tokens=6).model
    prompt = random_ids(1, 20)
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
                            pad_token_id=0, eos_token_id=None)  # fmt: skip
    (ours,) = generate(model, prompt.tolist(), decode=str, stop_ids=frozenset(), max_new_tokens=8)
    assert theirs[0, 20:].tolist() == list(ours.ids)


def test_what_cannot_be_right_is_refused(pair):
    model, _ = pair
    ids = random_ids(1, 5)
    with pytest.raises(ModelError, match="mask"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 5, 5))
    recompute_activations(model)
    model.train()
    if soft_of(model).kind == "key_values":
        with pytest.raises(ModelError, match="recomputation"):
            model(input_ids=ids)
    with torch.no_grad():  # nothing is recomputed, so nothing is lost
        assert model(input_ids=ids).logits.shape[1] == 5


def test_a_second_prompt_is_refused_and_the_first_stays():
    adapted = attached(name="prompt")
    before = laws.logits(adapted.model)
    with pytest.raises(ModelError, match="already"):
        attached(base=adapted.model, name="prompt")
    assert torch.equal(laws.logits(adapted.model), before)


def test_detaching_leaves_no_trace_and_keeps_a_forward_of_its_own():
    base = network("llama")
    before = set(vars(base))
    attached(base=base, name="prefix").detach()
    assert set(vars(base)) == before
    usual, calls = base.forward, []
    base.forward = own = lambda *args, **given: (calls.append(1), usual(*args, **given))[1]
    attached(base=base, name="prompt").detach()
    assert base.forward is own


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shared", [0, 30])
def test_generation_is_the_models_own(kind, name, shared):
    """Greedy answers token by token; prompts of several lengths, past the sliding window, and a single one."""
    adapted = attached(kind, name=name, tokens=7)
    laws.train(adapted, registry.make("methods", name), steps=2)
    stem = random_ids(1, shared, seed=3)[0].tolist()
    asked = [[*stem, *random_ids(1, 3 + 5 * n, seed=n)[0].tolist()] for n in range(3)]
    for batch in (asked, asked[:1]):
        answers = generate(adapted.model, batch, decode=str, stop_ids=frozenset(), max_new_tokens=9)
        for prompt, answer in zip(batch, answers, strict=True):
            ids = [*prompt, *answer.ids]
            table = torch.log_softmax(laws.logits(adapted.model, torch.tensor([ids]))[0, len(prompt) - 1 : -1], -1)
            chosen = table.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            assert torch.allclose(chosen, torch.tensor(answer.logprobs), atol=1e-3)
            assert float((table.max(1).values - chosen).max()) < 1e-3


def test_a_prompt_switched_off_is_not_generated_with():
    base = network("llama")
    asked = random_ids(2, 6).tolist()
    answer = functools.partial(generate, decode=str, stop_ids=frozenset(), max_new_tokens=5)
    plain = [a.ids for a in answer(base, asked)]
    for name in METHODS:
        adapted = attached(base=base, name=name)
        changed = [a.logprobs for a in answer(adapted.model, asked)]
        with adapted.disabled(), adapted.disabled():
            assert [a.ids for a in answer(adapted.model, asked)] == plain
        assert [a.logprobs for a in answer(adapted.model, asked)] == changed
        adapted.detach()


# ---------------------------------------------------------------- models that cannot share


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config).eval().requires_grad_(False)


def unshared():
    model = network("gemma3")
    refuse_sharing(model, "it has a way of its own")
    return model


@pytest.mark.parametrize("base", [mamba, unshared])
@pytest.mark.parametrize("name", ["prompt", "p_tuning", "multitask_prompt"])
def test_embeddings_are_exact_where_rows_run_apart(base, name):
    adapted = attached(base=base(), name=name, tokens=4) if base is unshared else None
    if adapted is None:
        shape = base()
        shape.config.num_attention_heads = 1  # what PEFT writes down of a model without attention
        adapted = attached(base=shape, name=name, tokens=4)
    made = laws.rows(2)
    loss = laws._separately(adapted.model, made)
    found = -sum(
        (logprobs(adapted.model, b) * b.target_weights).sum()
        for b in map(Batch.of, plan(made, budget=4096, share=False))
    )
    assert abs(float((loss - found).detach())) <= laws.BOUND * float(loss.detach())
    expected = laws._gradients(adapted, loss)
    assert float((laws._gradients(adapted, found) - expected).norm()) <= 10 * laws.BOUND * float(expected.norm())
    asked = random_ids(2, 8).tolist()
    for prompt, answer in zip(
        asked, generate(adapted.model, asked, decode=str, stop_ids=set(), max_new_tokens=5), strict=True
    ):
        ids = torch.tensor([[*prompt, *answer.ids]])
        table = torch.log_softmax(laws.logits(adapted.model, ids)[0, len(prompt) - 1 : -1].float(), -1)
        assert torch.allclose(table.max(1).values, torch.tensor(answer.logprobs), atol=1e-3)


@pytest.mark.parametrize("base", [mamba, unshared])
def test_keys_and_values_are_refused_where_rows_run_apart(base):
    model = base()
    with pytest.raises(SpecError, match="method: prompt"):
        attached(base=model, name="prefix")
    assert not hasattr(model, SOFT)


def test_a_model_found_out_after_the_prefix_was_put_on_says_so():
    adapted = attached(name="prefix")
    refuse_sharing(adapted.model, "it has a way of its own")
    (pack,) = plan(laws.rows(2)[:1], budget=4096)
    with pytest.raises(ModelError, match="own: it cannot take a prefix"):
        logprobs(adapted.model, Batch.of(pack))


def test_a_base_that_makes_more_of_its_ids_is_refused():
    base = network("llama")
    usual = base.model.forward
    base.model.forward = lambda input_ids=None, **given: usual(
        input_ids=None if input_ids is None else input_ids + 1, **given
    )
    with pytest.raises(SpecError, match="more of its input"):
        attached(base=base, name="prompt")


def test_dropout_is_not_taken_for_it():
    base = network("gpt2").train()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert attached(base=base, name="prompt").trainable()


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", [*FAMILIES, "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_plain_peft_gives_the_same_logits(kind, name, tmp_path):
    from peft import PeftModel

    adapted = attached(kind, name=name)
    laws.train(adapted, registry.make("methods", name), steps=3)
    adapted.save(tmp_path)
    ids = random_ids(2, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # an unexpected key would be one
        plain = PeftModel.from_pretrained(network(kind), tmp_path, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        theirs = plain(input_ids=ids).logits[:, -30:]
    assert torch.allclose(theirs, laws.logits(adapted.model, ids), atol=1e-5)


def peft_config(kind):
    import peft

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}
    return {
        "prompt": lambda: peft.PromptTuningConfig(**common),
        "prefix": lambda: peft.PrefixTuningConfig(**common),
        "projected": lambda: peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=12),
        "p_tuning": lambda: peft.PromptEncoderConfig(**common, encoder_reparameterization_type="LSTM"),
    }[kind]()


@pytest.mark.parametrize("written", ["prompt", "prefix", "projected", "p_tuning"])
def test_folders_that_peft_wrote_are_read(written, tmp_path):
    from peft import get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(network("qwen3"), peft_config(written)).eval()
    theirs.save_pretrained(tmp_path)
    name = "prefix" if written == "projected" else written
    ours = registry.make("methods", name).load(network("qwen3"), tmp_path)
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[:, -12:]
    assert torch.allclose(laws.logits(ours.model, ids), expected, atol=1e-5)
    assert set(ours.trainable()) == {"prompt_embeddings"}, "what was loaded can learn on"
    assert laws.train(ours, registry.make("methods", name))[-1] < 100


HOSTILE = [
    ("peft_type", "LORA"), ("peft_type", None), ("num_virtual_tokens", 0), ("num_virtual_tokens", -3),
    ("num_virtual_tokens", True), ("num_virtual_tokens", "20"), ("num_virtual_tokens", 10**12),
    ("num_virtual_tokens", None), ("token_dim", 65), ("num_layers", 2), ("num_attention_heads", 3),
    ("num_transformer_submodules", 2), ("task_type", "SEQ_2_SEQ_LM"), ("modules_to_save", ["lm_head"]),
    ("runs_code", "os.system"), ("auto_mapping", {"base_model_class": "GPT2LMHeadModel", "parent_library": "os"}),
]  # fmt: skip


@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=str)
def test_configurations_that_do_not_fit_are_refused(tmp_path, name, key, value):
    attached(name=name).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, key: value}))
    base = network("llama")
    with pytest.raises(
        CheckpointError, match="base_model_class" if key == "auto_mapping" else key.replace("peft_", "")
    ):
        registry.make("methods", name).load(base, tmp_path)
    assert not hasattr(base, SOFT)


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null"])
def test_a_configuration_must_be_an_object(tmp_path, text):
    attached(name="prompt").save(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match="object"):
        registry.make("methods", "prompt").load(network("llama"), tmp_path)


def test_whole_numbers_are_no_prompt(tmp_path):
    attached(name="prompt").save(tmp_path)
    save_file({"prompt_embeddings": torch.zeros(20, 64, dtype=torch.int64)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="whole numbers"):
        registry.make("methods", "prompt").load(network("llama"), tmp_path)


@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix"])
def test_names_of_files_and_code_are_never_followed(tmp_path, name, monkeypatch):
    adapted = attached(name=name)
    adapted.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / "luthier_was_here.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config["auto_mapping"]["parent_library"] = "luthier_was_here"
    config["base_model_name_or_path"] = str(tmp_path / "nowhere")
    if name == "prompt":
        config |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_kwargs": {"trust_remote_code": True},
                   "tokenizer_name_or_path": str(tmp_path / "nowhere")}  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    loaded = registry.make("methods", name).load(network("llama"), tmp_path)
    assert torch.equal(laws.logits(loaded.model), laws.logits(adapted.model))


def test_a_prompt_is_not_merged():
    for name in METHODS:
        assert registry.find("methods", name).not_merged
        with pytest.raises(SpecError, match="input, not weights"):
            attached(name=name).merge()


# ---------------------------------------------------------------- a shared prompt as the beginning


def test_a_source_is_started_from_exactly(tmp_path):
    learned = attached(name="prompt", tokens=9)
    laws.train(learned, registry.make("methods", "prompt"))
    learned.save(tmp_path)
    started = attached(name="multitask_prompt", source=str(tmp_path), rank=2)
    assert torch.equal(laws.logits(started.model), laws.logits(learned.model))
    assert len(soft_of(started.model).values()) == 9


def test_a_source_of_many_tasks_gives_their_mean(tmp_path):
    """Folders of PEFT's own multitask prompt tuning: the shared prompt times the mean of the tasks' matrices."""
    generator = torch.Generator().manual_seed(0)
    shared, columns, rows = (torch.randn(shape, generator=generator) for shape in ((4, 64), (3, 4, 2), (3, 2, 64)))
    tensors = {"prompt_embeddings": shared, "prefix_task_cols": columns, "prefix_task_rows": rows}
    save_file(tensors, tmp_path / WEIGHTS)
    found = soft_of(attached(name="multitask_prompt", source=str(tmp_path)).model).values()
    assert torch.allclose(found, shared * (columns.mean(0) @ rows.mean(0)), atol=1e-5)
    for name, wrong in [("prefix_task_rows", torch.randn(3, 64)), ("prefix_task_cols", torch.randn(3, 5, 2)),
                        ("prefix_task_rows", torch.randn(0, 2, 64)), ("prompt_embeddings", torch.randn(4, 63)),
                        ("prompt_embeddings", torch.tensor(1.0)), ("prefix_task_cols", torch.full((3, 4, 2), torch.nan))]:  # fmt: skip
        save_file({**tensors, name: wrong}, tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError):
            attached(name="multitask_prompt", source=str(tmp_path))
    with pytest.raises(CheckpointError, match="missing"):
        attached(name="multitask_prompt", source=str(tmp_path / "nowhere"))


# ---------------------------------------------------------------- counts


COUNTS = {  # on SmolLM2-135M: numbers that learn, numbers that are kept
    "prompt": (20 * 576, 20 * 576),
    "prefix": (16 * 30 * 2 * 192, 16 * 30 * 2 * 192),
    "p_tuning": (20 * 576 + 3 * (576 * 576 + 576), 20 * 576),
    "multitask_prompt": (20 * 576 + 20 + 576, 20 * 576),
}


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_known_before_anything_is_loaded(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                            num_attention_heads=9, num_key_value_heads=3))  # fmt: skip
    adapted = attached(base=base, name=name)
    trained, kept = COUNTS[name]
    assert sum(p.numel() for p in adapted.trainable().values()) == trained
    assert adapted.saved_bytes() == 4 * kept
    assert all(p.is_meta for p in adapted.trainable().values())


def test_no_decay_on_any_of_it():
    for name in METHODS:
        method, adapted = registry.make("methods", name), attached(name=name)
        groups = method.groups(list(adapted.trainable()))
        assert set(groups) == set(adapted.trainable())
        assert {group["weight_decay"] for group in groups.values()} == {0.0}
