"""The door to PEFT's shelf: every type keeps the laws or is refused with its reason; options are checked beforehand."""

from __future__ import annotations

import functools
import inspect
import json
import re

import laws
import pytest
import torch
from networks import network
from peft import PeftType

from luthier import registry
from luthier.adapt import allow, door, wrapped
from luthier.adapt.folder import CONFIG
from luthier.errors import CheckpointError, SpecError

TYPES = [kind.value for kind in PeftType]
# What the small networks of the tests need: sizes below their widths, and what has no default.
SMALL = {
    "ADAMSS": {"r": 8},
    "DEFT": {"r": 8},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 8, "alpha": 16},
    "OFT": {"oft_block_size": 8},
    "PEANUT": {"r": 8},
    "PSOFT": {"r": 8},
    "RANDLORA": {"r": 8, "randlora_alpha": 64},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 9, 40, 77]},
    "WAVEFT": {"n_frequency": 50},
}
LAWS = (  # each of them trains and learns something; the slower ones hold the rest
    laws.fresh_changes_nothing,
    laws.disabled_and_detached_are_the_base,
    laws.saved_and_loaded_is_the_same,
    laws.trees_equal_separate_rows,
)
SLOWER = (
    laws.it_learns,
    laws.only_the_adapter_learns,
    laws.first_values_come_from_the_seed_alone,
    laws.peft_alone_loads_it_or_names_luthier,
    laws.merged_equals_attached,
    functools.partial(laws.trees_equal_separate_rows, form="dense", recompute=True),
    laws.generation_is_the_models_own,
    laws.it_survives_a_kill,
    *(functools.partial(laws.damage_is_refused, damage=damage) for damage in ("missing", "extra", "shape", "nan")),
)
# Types with a page of their own keep the laws in test_methods.py, through the same code; the others keep them here.
ALONE = [kind for kind, entry in door.OPEN.items() if not entry.own]


def through(kind):
    return lambda: registry.make("methods", {"name": "peft", "type": kind, "options": SMALL.get(kind, {})})


def hold(law, kind, folder):
    takes_folder = "folder" in inspect.signature(law).parameters
    law(through(kind), folder) if takes_folder else law(through(kind))


def wrong(kind, **options):
    return {f.where: f.what for f in registry.check("methods", {"name": "peft", "type": kind, "options": options}, "m")}


def test_every_type_of_peft_is_open_or_refused_with_a_reason():
    """A new PEFT brings new types: someone has to decide about each."""
    assert set(door.OPEN) | set(door.REFUSED) == set(TYPES)
    assert not set(door.OPEN) & set(door.REFUSED)
    assert all(len(reason) > 20 for reason in door.REFUSED.values())


def test_names_that_reasons_send_people_to_stand_on_the_shelf():
    told = " ".join([*door.REFUSED.values(), *allow.CLOSED.values(), *allow.FIRST_VALUES.values()])
    named = set(re.findall(r"`(\w+)`", told)) | {entry.own for entry in door.OPEN.values() if entry.own}
    assert named
    assert named <= set(registry.names("methods"))


def test_closed_keys_are_keys_that_peft_has():
    for key in allow.CLOSED:
        kind, _, name = key.rpartition(".")
        assert any(name in allow.fields(one) for one in ([kind] if kind else door.OPEN)) or name in ("auto_mapping",)


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_type_without_a_page_keeps_the_laws(kind, law, tmp_path):
    hold(law, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("law", SLOWER, ids=lambda law: getattr(law, "__name__", str(getattr(law, "keywords", law))))
def test_a_type_without_a_page_keeps_the_slower_laws(kind, law, tmp_path):
    hold(law, kind, tmp_path)


@pytest.mark.parametrize("kind", sorted(set(door.OPEN) - set(ALONE)))
def test_a_type_with_a_page_goes_through_the_door_as_well(kind, tmp_path):
    laws.saved_and_loaded_is_the_same(through(kind), tmp_path)


@pytest.mark.parametrize("kind", sorted(door.REFUSED))
def test_a_refused_type_is_refused_in_a_task_and_in_a_folder(kind, tmp_path):
    (fault,) = registry.check("methods", {"name": "peft", "type": kind.lower()}, "method")
    assert fault.where == "method.type"
    assert door.REFUSED[kind] in fault.what
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(CheckpointError, match=kind):
        wrapped.read_config(tmp_path)


def test_an_unknown_type_gets_a_suggestion():
    (fault,) = registry.check("methods", {"name": "peft", "type": "gralor"}, "method")
    assert "did you mean 'gralora'" in fault.what


def test_what_a_method_tells_depends_on_the_type():
    c3a, beft = through("C3A")(), through("BEFT")()
    assert c3a.learning_rate > 10 * beft.learning_rate
    assert beft.not_merged
    assert not c3a.not_merged
    assert through("HRA")().fresh == "tolerance"
    for kind, entry in door.OPEN.items():
        assert entry.bracket[0] < entry.learning_rate < entry.bracket[1], kind


@pytest.mark.parametrize(
    ("kind", "options", "place", "what"),
    [
        ("lora", {"rr": 8}, "rr", "did you mean 'r'"),
        ("lora", {"r": "eight"}, "r", "valid integer"),
        ("lora", {"r": True}, "r", "valid integer"),
        ("lora", {"r": 10**9}, "r", "between 1 and 1024"),
        ("lora", {"lora_alpha": float("inf")}, "lora_alpha", "must lie between"),
        ("lora", {"modules_to_save": ["lm_head"]}, "modules_to_save", "copies whole modules"),
        ("lora", {"bias": "all"}, "bias", "`bitfit`"),
        ("lora", {"init_lora_weights": "pissa_niter_16"}, "init_lora_weights", "`pissa`"),
        ("lora", {"init_lora_weights": "eva"}, "init_lora_weights", "rows or statistics"),
        ("lora", {"corda_config": {"cache_file": "/etc/passwd"}}, "corda_config", "rows or statistics"),
        ("lora", {"loftq_config": {"loftq_bits": 4}}, "loftq_config", "base's own weights"),
        ("lora", {"megatron_core": "os"}, "megatron_core", "names code"),
        ("lora", {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens", "switches the adapter on"),
        ("lora", {"target_modules": r".*(q|v)_proj(a+)+"}, "target_modules", "plain name"),
        ("lora", {"rank_pattern": {"q_proj": 10**7}}, "rank_pattern", "must lie between"),
        ("lora", {"rank_pattern": {"(a+)+$": 8}}, "rank_pattern", "plain name"),
        ("waveft", {"wavelet_family": "../../etc"}, "wavelet_family", "plain name"),
        ("glora", {"config_A_B": "lorra"}, "config_A_B", "'lora'"),
        ("trainable_tokens", {"token_indices": [-1]}, "token_indices", "must lie between"),
        ("vblora", {"save_only_topk_weights": True}, "save_only_topk_weights", "cannot be trained"),
        ("adamss", {"use_asa": True}, "use_asa", "only PEFT's own trainer"),
    ],
)
def test_an_option_that_cannot_be_is_named_before_anything_is_loaded(kind, options, place, what):
    found = wrong(kind, **options)
    assert list(found) == [f"m.options.{place}"]
    assert what in found[f"m.options.{place}"]


def test_all_wrong_options_are_told_at_once():
    assert set(wrong("lora", rr=1, r="x", bias="all")) == {"m.options.rr", "m.options.r", "m.options.bias"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LORA", {"lora_alpha": 1.5, "use_rslora": True, "rank_pattern": {"q_proj": 4}}),
        ("LORA", {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["layers.0.self_attn.q_proj"]}),
        ("LORA", {"init_lora_weights": "mica", "r": 4}),
        ("LORA", {"lora_bias": True}),
        ("LORA", {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj", "up_proj"]}),
        ("OFT", {"oft_block_size": 8, "block_share": True, "use_cayley_neumann": False}),
        ("MISS", {"r": 8, "init_weights": "bat"}),
        ("SUPERTUNING", {"r": 4, "lora_alpha": 8.0, "save_precomputed_indices": False}),
        ("VERA", {"r": 8, "save_projection": True}),
        ("ROAD", {"variant": "road_4"}),
        ("LOKR", {"decompose_both": True, "decompose_factor": 8}),
    ],
)
def test_options_that_change_shapes_or_products_survive_a_file(kind, options, tmp_path):
    def make():
        return registry.make("methods", {"name": "peft", "type": kind.lower(), "options": options})

    laws.saved_and_loaded_is_the_same(make, tmp_path)
    laws.disabled_and_detached_are_the_base(make)


def test_patterns_are_written_as_the_names_that_they_matched(tmp_path):
    options = {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.0\..*"}
    made = registry.make("methods", {"name": "peft", "type": "lora", "options": options})
    laws.attach(made, network("llama")).save(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    expected = {f"model.layers.{i}.self_attn.{name}_proj" for i in (1, 2) for name in "qv"}
    assert set(written["target_modules"]) == expected
    assert written["exclude_modules"] is None


def test_widths_that_divide_a_base_are_found():
    for kind, key in (("C3A", "block_size"), ("ROAD", "group_size"), ("VBLORA", "vector_length")):
        adapted = laws.attach(through(kind)(), network("qwen3"))
        chosen = getattr(adapted.config, key)
        shapes = [m.weight.shape for n, m in network("qwen3").named_modules() if n.endswith("_proj")]
        assert all(width % chosen == 0 for shape in shapes for width in shape)
        assert chosen > 1


def test_a_plan_that_needs_weights_says_so():
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(network("llama").config)
    with pytest.raises(SpecError, match="a plan does not read"):
        through("ADAMSS")().attach(base, seed=0)
    assert through("GLORA")().attach(base, seed=0).trainable()


def test_a_package_that_a_type_needs_is_named(monkeypatch):
    from luthier.adapt import wrapped

    def lacks(*arguments, **options):
        raise ImportError("scikit-learn is required for AdaMSS. Please install it")

    base = network("llama")
    monkeypatch.setattr(wrapped, "get_peft_model", lacks)
    with pytest.raises(SpecError, match="pip install scikit-learn"):
        registry.make("methods", {"name": "peft", "type": "adamss"}).attach(base, seed=0)
