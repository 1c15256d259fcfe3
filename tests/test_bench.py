"""Speed measured: work against counts by hand, parts that add up, what the command tells and refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import networks
import pytest
import torch
from test_train_flow import write_task

from luthier import registry
from luthier import spec as specs
from luthier.errors import SpecError, UsageError
from luthier.flows import bench, bench_answers
from luthier.flows.trials import bits
from luthier.model import limit
from luthier.model.batch import Batch
from luthier.model.limit import Product, Spread
from luthier.records import Rendered
from luthier.spec import TrainSpec
from luthier.text import pack
from luthier.training import profile, work
from luthier.training.feed import ShuffledFeed
from luthier.training.loop import Training

LAYERS, HIDDEN, INNER, KEYS = 3, 64, 96, 32  # of the small llama, whose heads are 4 of 16 over 2
BLOCK = [
    (HIDDEN, HIDDEN),
    (HIDDEN, KEYS),
    (HIDDEN, KEYS),
    (HIDDEN, HIDDEN),
    (HIDDEN, INNER),
    (HIDDEN, INNER),
    (INNER, HIDDEN),
]
FIRST = BLOCK[:3]  # what reads a block's input: needs no gradient of it where nothing below learns
RANK = 3


def rows(count: int = 8, own: int = 30, shared: int = 41, targets: int = 5) -> list[Rendered]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        mine = torch.randint(50, networks.VOCABULARY, (own + index,), generator=draw).tolist()
        ids = (*range(5, 5 + shared), *mine)
        made.append(Rendered(ids, (*[0.0] * (len(ids) - targets), *[1.0] * targets), len(ids) - targets, str(index)))
    return made


def trained(kind: str, name: str, *, plan: Any = pack.plan, checkpointing: bool = False, **options: Any):
    """A training of a small network, the watch on it, and what learns."""
    base = networks.network(kind)
    own = profile.matrices(base)
    method = registry.make("methods", {"name": name, **options}, "method")
    adapted = method.attach(base, seed=0)
    feed = ShuffledFeed(rows(), batch_size=8, seed=0, epochs=9, budget=10_000, plan=plan)
    settings = TrainSpec(learning_rate=1e-3, checkpointing=checkpointing)
    training = Training(adapted, registry.make("objectives", "sft"), feed, settings, method=method)
    return training, profile.Watch(training, adapted, own), adapted


def watched(kind: str, name: str, **options: Any):
    """One watched step: what was seen, its packs, what learns, and the step."""
    training, watch, adapted = trained(kind, name, **options)
    going = iter(training)
    with watch.watching() as seen:
        step = next(going)
    return seen, watch.packs, adapted, step


def weights(*shapes: tuple[int, int]) -> int:
    return sum(a * b for a, b in shapes)


# --- work


def test_lora_multiplies_what_is_counted_by_hand():
    seen, packs, _, step = watched("llama", "lora", rank=RANK)
    tokens = len(packs[0])
    assert len(packs) == 1 and tokens == step.tokens < step.plain_tokens
    everything = LAYERS * weights(*BLOCK)
    assert seen.flops[profile.FORWARD] == 2 * tokens * everything
    assert seen.flops[profile.BACKWARD] == 2 * tokens * (everything - weights(*FIRST))
    outer = LAYERS * sum(a + b for a, b in BLOCK)  # A and B: forward, their gradients, the gradient through both
    assert seen.flops[profile.ADAPTER] == 2 * tokens * RANK * (3 * outer - sum(a for a, _ in FIRST))
    assert seen.flops[profile.HEAD] == 2 * 2 * len(packs[0].target_ids) * HIDDEN * networks.VOCABULARY


@pytest.mark.parametrize(
    "name, options, backward, head",
    [
        ("full", {}, 2 * LAYERS * weights(*BLOCK), 3),
        ("layers", {"last": 1}, 2 * weights(*BLOCK), 2),  # its first norm learns: q, k, v pass a gradient down
        ("head", {}, 0, 2),
    ],
)
def test_other_methods_multiply_what_is_counted_by_hand(name, options, backward, head):
    seen, packs, adapted, _ = watched("llama", name, **options)
    tokens, targets = len(packs[0]), len(packs[0].target_ids)
    assert seen.flops[profile.FORWARD] == 2 * tokens * LAYERS * weights(*BLOCK)
    assert seen.flops[profile.BACKWARD] == 2 * tokens * backward
    assert seen.flops[profile.ADAPTER] == 0
    needed = work.rates(seen, packs, adapted).of(packs)
    assert needed[profile.HEAD] == head * 2 * targets * HIDDEN * networks.VOCABULARY
    assert seen.flops[profile.HEAD] == needed[profile.HEAD]


@pytest.mark.parametrize("kind", networks.KINDS)
def test_attention_is_counted_pair_by_pair(kind):
    seen, packs, adapted, _ = watched(kind, "lora", rank=RANK)
    config = adapted.model.config.get_text_config()
    tree = Batch.of(packs[0]).tree
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * LAYERS
    pairs = [int(tree.mask(networks.WINDOW if "sliding" in one else None).sum()) for one in kinds]
    width = config.num_attention_heads * 16
    assert work.rates(seen, packs, adapted).of(packs)[profile.ATTENTION] == 4 * width * 3 * sum(pairs)


def test_no_gradient_runs_through_frozen_attention():
    seen, packs, adapted, _ = watched("llama", "layers", last=1)
    assert (seen.attended, seen.learnt) == (LAYERS, 1)
    whole, packs_too, other, _ = watched("llama", "lora", rank=RANK)
    rates = [work.rates(s, p, a) for s, p, a in ((seen, packs, adapted), (whole, packs_too, other))]
    part, all_of_it = (one.of(packs)[profile.ATTENTION] for one in rates)
    assert part == pytest.approx(all_of_it * (LAYERS + 2 * 1) / (3 * LAYERS))


def test_separate_rows_cost_what_they_cost_unpacked():
    seen, packs, adapted, _ = watched("llama", "lora", rank=RANK)
    rates = work.rates(seen, packs, adapted)
    apart = pack.plan(rows(), budget=10_000, share=False)
    assert rates.separate(packs, everywhere=False) == pytest.approx(rates.of(apart))
    everywhere = rates.separate(packs, everywhere=True)
    assert everywhere[profile.HEAD] == rates.head * sum(len(one) for one in apart)
    assert sum(rates.of(packs).values()) < sum(rates.of(apart).values()) < sum(everywhere.values())


def test_what_is_computed_again_is_no_needed_work():
    plain, packs, adapted, step = watched("llama", "lora", rank=RANK)
    again, packs_too, adapted_too, step_too = watched("llama", "lora", rank=RANK, checkpointing=True)
    assert step_too.loss == pytest.approx(step.loss, rel=1e-5)
    assert again.flops[profile.RECOMPUTED] > 0.9 * plain.flops[profile.FORWARD]
    assert plain.flops[profile.RECOMPUTED] == 0
    one, two = work.rates(plain, packs, adapted), work.rates(again, packs_too, adapted_too)
    # With recomputation transformers asks for the embeddings' gradient: the first block passes one down in vain.
    vain = 2 * len(packs[0]) * (weights(*FIRST) + RANK * sum(inputs for inputs, _ in FIRST))
    assert sum(two.of(packs).values()) == pytest.approx(sum(one.of(packs).values()) + vain)
    assert again.attended == plain.attended


# --- where time goes


@pytest.mark.parametrize("kind, name", [("llama", "lora"), ("gemma3", "full"), ("gpt_neox", "prompt")])
def test_parts_add_up_to_the_step(kind, name):
    seen, _, _, step = watched(kind, name)
    parts = seen.parts()
    assert sum(parts.values()) == pytest.approx(seen.wall) and min(parts.values()) >= 0
    assert {
        profile.FORWARD,
        profile.ATTENTION,
        profile.HEAD,
        profile.ELEMENTWISE,
        profile.OPTIMISER,
        profile.DATA,
    } < set(parts)
    assert step.seconds <= seen.wall


def test_time_is_told_where_it_was_spent(monkeypatch):
    def slow_plan(*args, **kwargs):
        time.sleep(0.2)
        return pack.plan(*args, **kwargs)

    seen, *_ = watched("llama", "lora", plan=slow_plan)
    assert 0.2 <= seen.parts()[profile.DATA] < seen.wall
    usual = torch.nn.functional.silu

    def slow_silu(*args, **kwargs):
        time.sleep(0.05)
        return usual(*args, **kwargs)

    training, watch, _ = trained("llama", "lora")
    going = iter(training)
    next(going)
    monkeypatch.setattr(torch.nn.functional, "silu", slow_silu)
    with watch.watching() as seen:
        next(going)
    assert seen.parts()[profile.REST] > 0.04 * LAYERS, "time between operations is no operation's"


def test_backward_attention_is_attention():
    """Gathering and adding up inside the attention's backward pass belong to it, whatever they are made of."""
    seen, *_ = watched("llama", "lora", rank=RANK)
    training, watch, _ = trained("llama", "lora", rank=RANK)
    told = []
    part = watch._part

    def heard(func, args):
        found = part(func, args)
        node = torch._C._current_autograd_node()
        if node is not None and "Cascade" in node.name():
            told.append(found)
        return found

    watch._part = heard
    with watch.watching():
        next(iter(training))
    assert seen.attended == seen.learnt == LAYERS
    assert len(told) > LAYERS and set(told) == {profile.ATTENTION}


def test_watching_changes_nothing():
    plain, _, adapted = trained("llama", "lora", rank=RANK)
    steps = [step.loss for _, step in zip(range(4), plain, strict=False)]
    training, watch, other = trained("llama", "lora", rank=RANK)
    going, seen = iter(training), []
    for number in range(4):
        if number % 2:
            with watch.watching():
                seen.append(next(going).loss)
        else:
            seen.append(next(going).loss)
    assert seen == steps
    for name, weight in adapted.trainable().items():
        assert torch.equal(weight, other.trainable()[name])


def test_ranges_of_the_profiler_name_every_part(monkeypatch):
    """The way that CUDA's kernels are timed, on what there is: a range for each operation, one for a node of attention."""
    plain, _, _ = trained("llama", "lora", rank=RANK)
    losses = [step.loss for _, step in zip(range(2), plain, strict=False)]
    training, watch, _ = trained("llama", "lora", rank=RANK)
    counted: dict[str, int] = {}

    def count(profiler):
        counted.update(
            {event.key: event.count for event in profiler.key_averages() if event.key.startswith("luthier.")}
        )
        return {}

    monkeypatch.setattr(profile, "_kernel_seconds", count)
    watch._ranges = True
    going = iter(training)
    with watch.watching() as seen:
        first = next(going)
    assert [first.loss, next(going).loss] == losses
    assert {f"luthier.{part}" for part in (profile.FORWARD, profile.BACKWARD, profile.ADAPTER, profile.HEAD)} < set(
        counted
    )
    assert counted["luthier.attention"] >= 2 * LAYERS, "forward and backward"
    assert seen.attended == LAYERS and seen.flops[profile.FORWARD] == 2 * 301 * LAYERS * weights(*BLOCK)


# --- the limit


def test_a_limit_is_measured_shape_by_shape():
    asked = {Product(64, 32, 16): 3.0, Product(16, 64, 128): 2.0}
    found = limit.measure(asked, dtype=torch.float32, rounds=2, seconds=0.002)
    assert Product(64, 32, 16).flops == 2 * 64 * 32 * 16
    assert set(found.products) == set(asked) and found.rate.count == 2
    slowest, fastest = min(s.low for s in found.products.values()), max(s.high for s in found.products.values())
    assert slowest <= found.rate.low <= found.rate.high <= fastest
    both = found.joined(found)
    assert both.rate.count == 4 and both.rate.median == pytest.approx(found.rate.median)
    assert next(iter(both.products.values())).count == 4


def test_rare_shapes_are_left_out_of_the_limit():
    asked = {Product(512, 64, 64): 1.0, Product(2, 2, 2): 1.0}
    assert list(limit.measure(asked, dtype=torch.float32, rounds=1, seconds=0.002).products) == [Product(512, 64, 64)]


def test_a_spread_is_a_median_with_its_range():
    assert Spread.of([3.0, 1.0, 2.0]).as_dict() == {"median": 2.0, "low": 1.0, "high": 3.0, "count": 3}


@pytest.mark.parametrize("kind", networks.KINDS)
def test_a_pass_reads_every_weight_but_the_looked_up_ones(kind):
    model = networks.network(kind)
    found = limit.reading(model)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = table is head
    assert found.weights == sum(p.nbytes for p in model.parameters()) - (0 if tied else table.nbytes)
    products = found.products(7, 2)
    body = sum(t * one.flops for one, t in products.items()) - 2 * 2 * head.numel()
    inside = [m.weight for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    assert body == 2 * 7 * sum(weight.numel() for weight in inside)


def test_memory_is_read_faster_than_a_disk():
    assert 1e8 < limit.read_speed(numbers=1 << 20, rounds=2).median < 1e13


# --- the command

SPREAD = {
    "type": "object",
    "properties": {name: {"type": "number", "minimum": 0} for name in ("median", "low", "high", "count")},
    "required": ["median", "low", "high", "count"],
}
FIGURES = [
    "seconds_a_step",
    "rows_a_second",
    "tokens_a_second",
    "computed_tokens_a_second",
    "gflop_a_step",
    "gflops",
    "share_of_limit",
]
TRAIN = {
    "type": "object",
    "properties": {
        **dict.fromkeys(FIGURES, SPREAD),
        "limit": {"type": "object", "properties": {"gflops": SPREAD, "shapes": {"type": "array", "minItems": 1}}},
        "gain": {"type": "object", "required": ["less_work", "less_work_by_sharing", "less_work_by_logits"]},
        "machine": {"type": "object", "required": ["device", "capability", "cores", "threads", "dtype", "torch"]},
        "peak_bytes": {"type": "integer", "minimum": 1},
    },
    "required": [*FIGURES, "limit", "gain", "machine", "peak_bytes", "profile", "gflop_by_part", "steps"],
}
PREFILL = ("seconds", "tokens_a_second", "gflops", "limit_gflops", "share_of_limit")
DECODE = ("seconds", "tokens_a_second", "share_of_limit")
READING = {
    "type": "object",
    "properties": {
        name: {"type": "object", "properties": dict.fromkeys(keys, SPREAD), "required": list(keys)}
        for name, keys in (("prefill", PREFILL), ("decode", DECODE))
    },
    "required": ["prefill", "decode"],
}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def quick(monkeypatch):
    """Limits need no precision here."""
    monkeypatch.setattr(limit, "READ", 1 << 20)
    usual = limit.measure
    monkeypatch.setattr(limit, "measure", lambda *a, **k: usual(*a, **{**k, "rounds": 1, "seconds": 0.002}))


def ordered(told: Any) -> bool:
    """Whether every spread in some JSON is one."""
    if isinstance(told, dict):
        if set(told) == {"median", "low", "high", "count"}:
            return bool(told["low"] <= told["median"] <= told["high"] and told["count"] >= 1)
        return all(map(ordered, told.values()))
    return all(map(ordered, told)) if isinstance(told, list) else True


def test_bench_train_tells_every_figure_with_its_range(run, task, quick):
    code, out, _ = run("bench", "train", task, "method.dropout=0", "--steps", 3, "--profile", "--json")
    told = json.loads(out)
    assert code == 0 and told["steps"] == told["seconds_a_step"]["count"] == 3
    jsonschema.validate(told, TRAIN)
    assert ordered(told)
    assert 0 < told["share_of_limit"]["median"] < 1.2
    assert told["gain"]["less_work"] == pytest.approx(
        told["gain"]["less_work_by_sharing"] * told["gain"]["less_work_by_logits"]
    )
    assert told["gain"]["less_work_by_sharing"] > 1.1 and told["gain"]["less_work_by_logits"] > 1
    found = told["profile"]
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1)
    assert found["memory"]["peak_bytes"] == sum(found["memory"]["parts"].values())
    assert not (task.parent / "runs").exists(), "a measurement leaves nothing behind"


def test_bench_train_prints_tables(run, task, quick):
    code, out, _ = run("bench", "train", task, "method=ia3", "--steps", 1)
    assert code == 0 and "share of what is possible" in out and "Where the time" not in out
    _, out, _ = run("bench", "train", task, "--steps", 1, "--profile")
    assert "attention" in out and "Memory as planned" in out


def test_a_method_that_cannot_be_rehearsed_is_measured_all_the_same(run, task, quick):
    code, out, err = run("bench", "train", task, "method=shira", "--steps", 1, "--profile", "--json")
    assert code == 0 and json.loads(out)["profile"]["memory"] is None
    assert "memory by kind is not known" in err


def test_the_base_is_left_as_it_was(task, quick):
    spec = specs.load(task)
    prepared = bench.prepare(spec)
    base, _ = bench.flow.load_base(spec, prepared, print)
    before = bits(base)
    with bench._trained(spec, prepared, base, 1, False, print) as (training, _, _):
        next(iter(training))
    assert bits(base) == before


def test_bench_evaluate_parts_prompts_from_answers(run, task, quick):
    code, out, _ = run("bench", "evaluate", task, "--rows", 6, "--rounds", 2, "--json")
    told = json.loads(out)
    assert code == 0 and told["rows"] == 6 and ordered(told)
    jsonschema.validate(told, READING)
    first = told["prefill"]
    assert 0 < first["needed_tokens"] < first["prompt_tokens"], "the instruction is needed once"
    assert 0 < first["share_of_limit"]["median"] < 1.2
    assert told["seconds"]["count"] == 2 and told["scoring_seconds"] > 0
    assert told["decode"]["tokens"] == told["new_tokens"] - 6
    code, out, _ = run("bench", "evaluate", task, "--rows", 4, "--rounds", 1)
    assert code == 0 and "answers: tokens a second" in out


def test_bench_generate_measures_batches_of_a_task_or_a_model(run, task, quick):
    code, out, _ = run(
        "bench", "generate", "--model", "tiny", "--batches", "1,3", "--tokens", 4, "--rounds", 1, "--json"
    )
    told = json.loads(out)
    assert code == 0 and [one["batch_size"] for one in told["batches"]] == [1, 3] and ordered(told)
    for one in told["batches"]:
        jsonschema.validate(one, READING)
        assert one["new_tokens"] == 4 * one["rows"] and one["decode"]["tokens"] == 3 * one["rows"]
        assert one["prefill"]["needed_tokens"] == one["prefill"]["prompt_tokens"], "made-up prompts share nothing"
    code, out, _ = run("bench", "generate", task, "--batches", "2", "--tokens", 3, "--rounds", 1)
    assert code == 0 and "Batch of 2" in out


def test_needed_prompt_tokens_are_those_of_the_trie():
    asked = bench_answers._Asked(None, [(1, 2, 3, 4), (1, 2, 3, 5, 6), (1, 9)], 3, 1, frozenset(), None)
    assert asked.needed() == (4 + 2 + 1, (1 + 2 + 3 + 4) + (4 + 5) + 2)
    twice = bench_answers._Asked(None, [(1, 2, 3), (1, 2, 3)], 2, 1, frozenset(), None)
    assert twice.needed()[0] == 3 + 1, "each row computes its own last token"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("generate",), "give TASK, or --model NAME"),
        (("generate", "--model", "tiny", "--batches", "1,x"), "not a list of batch sizes"),
        (("generate", "--model", "tiny", "--batches", "0"), "not a list of batch sizes"),
        (("train", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_wrong_use_says_what_to_do(run, arguments, words):
    code, out, err = run("bench", *arguments, "--json")
    assert code == 2 and words in err and json.loads(out)["error"]["exit_code"] == 2


def test_settings_that_do_not_fit_are_refused(task):
    with pytest.raises(SpecError):
        bench.train(specs.load(task, ["method=nonsense"]))
    with pytest.raises(UsageError):
        bench_answers.generate(specs.load(task), model="tiny")


def test_kept_lower_states_are_no_work(task, quick):
    """Where only the last block learns over several epochs, the lower ones do not run: their work is not counted."""
    top = ["method={name: layers, last: 1}", "train.epochs=4"]
    kept = bench.train(specs.load(task, top), steps=1)
    run_all = bench.train(specs.load(task, [*top, "train.keep_lower_states=false"]), steps=1)
    kept, run_all = kept["gflop_by_part"], run_all["gflop_by_part"]
    assert kept[profile.FORWARD] == pytest.approx(run_all[profile.FORWARD] / 2), "one of two blocks"
    assert kept[profile.ATTENTION] == pytest.approx(run_all[profile.ATTENTION] * 3 / 4), "three of four passes"
    assert kept[profile.BACKWARD] == pytest.approx(run_all[profile.BACKWARD])
