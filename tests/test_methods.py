"""The laws that every method on the shelf meets by merely standing there."""

from __future__ import annotations

import functools
import json

import laws
import pytest
import torch
from networks import VOCABULARY, network

from luthier import registry
from luthier.adapt import folder as adapt
from luthier.adapt import wrapped
from luthier.errors import CheckpointError, SpecError

METHODS = registry.names("methods")


@pytest.fixture(params=METHODS)
def make(request):
    return functools.partial(registry.make, "methods", request.param)


def test_a_fresh_adapter_changes_nothing(make):
    laws.fresh_changes_nothing(make)


def test_it_learns(make):
    laws.it_learns(make)


def test_only_the_adapter_learns(make):
    laws.only_the_adapter_learns(make)


def test_disabled_and_detached_are_the_base(make):
    laws.disabled_and_detached_are_the_base(make)


def test_first_values_come_from_the_seed_alone(make):
    laws.first_values_come_from_the_seed_alone(make)


def test_saved_and_loaded_is_the_same(make, tmp_path):
    laws.saved_and_loaded_is_the_same(make, tmp_path)


def test_peft_alone_loads_it_or_names_luthier(make, tmp_path):
    laws.peft_alone_loads_it_or_names_luthier(make, tmp_path)


def test_merged_equals_attached(make):
    laws.merged_equals_attached(make)


@pytest.mark.parametrize("form", ["cascade", "dense"])
@pytest.mark.parametrize("recompute", [False, True])
def test_trees_equal_separate_rows(make, form, recompute):
    laws.trees_equal_separate_rows(make, form=form, recompute=recompute)


def test_generation_is_the_models_own(make):
    laws.generation_is_the_models_own(make)


def test_it_survives_a_kill(make, tmp_path):
    laws.it_survives_a_kill(make, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan", "garbage", "other_base"])
def test_what_does_not_fit_is_refused(make, tmp_path, damage):
    laws.damage_is_refused(make, tmp_path, damage)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt_neox"])
def test_it_attaches_to_other_families(make, kind):
    """Or says why it cannot, and then leaves the base as it was."""
    before = laws.logits(network(kind))
    try:
        laws.fresh_changes_nothing(make, kind)
    except SpecError as error:
        assert error.what
        return
    laws.trees_equal_separate_rows(make, kind)
    base = network(kind)
    assert torch.equal(laws.logits(laws.attach(make(), base).detach()), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}),
        ("corda_config", {"cache_file": "/etc/passwd"}),
        ("megatron_core", "os"),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 10**6]]),
        ("alora_invocation_tokens", [5]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("r", 100_000),
        ("r", "16"),
        ("r", 16.5),
        ("lora_alpha", float("nan")),
        ("rank_pattern", {"q_proj": 10**9}),
        ("rank_pattern", {"(a+)+$": 8}),
        ("target_modules", "(a|a)*b"),
        ("target_modules", [".*.*.*.*.*.*"]),
        ("layers_pattern", "(x+)+y"),
        ("peft_type", "NOSUCH"),
        ("peft_type", "XLORA"),
        ("loftq_config", {"x": 1}),
        ("arrow_config", {"top_k": 2}),
        ("nosuch", "value"),
    ],
)
def test_steering_keys_are_refused(tmp_path, key, value):
    registry.make("methods", "lora").attach(network("llama"), seed=0).save(tmp_path)
    config = json.loads((tmp_path / adapt.CONFIG).read_text())
    (tmp_path / adapt.CONFIG).write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=key if key != "peft_type" else value):
        wrapped.read_config(tmp_path)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("BOFT", "boft_n_butterfly_factor", 60),
        ("C3A", "block_size", 0),
        ("FOURIERFT", "n_frequency", 10**12),
        ("PEANUT", "depth", 10**6),
        ("PEANUT", "act_fn", "os.system('x')"),
        ("RANDLORA", "projection_prng_key", -1),
        ("TINYLORA", "u", 10**9),
        ("VBLORA", "num_vectors", 10**9),
        ("VERA", "r", 10**9),
        ("WAVEFT", "wavelet_family", "a/b"),
    ],
)
def test_a_folder_cannot_ask_for_terabytes_or_name_files(tmp_path, kind, key, value):
    (tmp_path / adapt.CONFIG).write_text(json.dumps({"peft_type": kind, key: value}))
    with pytest.raises(CheckpointError, match=key):
        wrapped.read_config(tmp_path)
    (tmp_path / adapt.CONFIG).write_text(json.dumps({"peft_type": kind}))
    assert wrapped.read_config(tmp_path)


def test_how_first_values_were_drawn_no_longer_matters_in_a_folder(tmp_path):
    """Data-driven and random starts leave the base alone: only what they led to is in the file."""
    for start in ("gaussian", "eva", True, None):
        (tmp_path / adapt.CONFIG).write_text(json.dumps({"peft_type": "LORA", "init_lora_weights": start}))
        assert wrapped.read_config(tmp_path).init_lora_weights is True


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
