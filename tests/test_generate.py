"""Generation with a shared prompt equals the model's own, token by token."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from networks import KINDS, VOCABULARY, network

from luthier import registry
from luthier.model import decode, refill, stems
from luthier.model.draw import Sampling, choose
from luthier.model.generate import generate, stream

FAMILIES = (*KINDS, "mistral")

STOPS = frozenset(range(3, 12))


def prompts(shared: int, seed: int = 0, count: int = 6) -> list[list[int]]:
    rng = random.Random(seed)
    stem = [rng.randrange(VOCABULARY) for _ in range(shared)]
    return [stem + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 20))] for _ in range(count)]


def tree_of_prompts(seed: int = 0) -> list[list[int]]:
    """Two tasks, one of them with two longer beginnings; rows that share nothing; a prompt twice."""
    rng = random.Random(seed)

    def some(n: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(n)]

    first, second, longer = some(70), some(40), some(60)
    rows = [first + some(rng.randrange(1, 20)) for _ in range(4)]
    rows += [first + longer + some(rng.randrange(1, 9)) for _ in range(4)]
    rows += [second + some(rng.randrange(1, 20)) for _ in range(5)] + [some(n) for n in (1, 7, 60)]
    rows.append(list(rows[0]))
    rng.shuffle(rows)
    return rows


LAYOUTS = {"apart": prompts(0), "one stem": prompts(30), "a tree": tree_of_prompts()}


@torch.no_grad()
def one_by_one(model, prompt, limit, stops=STOPS):
    """Greedy tokens, why they end, and their log-probabilities, from a pass over everything for each token."""
    ids, logprobs = list(prompt), []
    for _ in range(limit):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
        logprobs.append(float(torch.log_softmax(logits.float(), -1)[ids[-1]]))
        if ids[-1] in stops:
            return ids[len(prompt) : -1], "end", logprobs
    return ids[len(prompt) :], "length", logprobs


@functools.cache
def oracle(kind, layout, limit):
    return [one_by_one(network(kind), prompt, limit) for prompt in LAYOUTS[layout]]


def same(model, asked, limit=14, expected=None, **options):
    answers = generate(model, asked, decode=str, stop_ids=STOPS, max_new_tokens=limit, **options)
    expected = expected or [one_by_one(model, prompt, limit) for prompt in asked]
    for (ids, stop, logprobs), answer in zip(expected, answers, strict=True):
        assert list(answer.ids) == ids
        assert answer.stop == stop
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("capacity", [3, 32])
def test_answers_equal_the_models_own(kind, layout, capacity):
    same(network(kind), LAYOUTS[layout], batch_size=capacity, expected=oracle(kind, layout, 14))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("options", [{"name": "prompt", "tokens": 6}, {"name": "prefix", "tokens": 21}, {"name": "lora"}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("layout", ["apart", "a tree"])
def test_answers_with_an_adapter_equal_the_models_own(kind, options, layout):
    adapted = registry.make("methods", options).attach(network(kind), seed=3)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    same(adapted.model, LAYOUTS[layout], limit=6, batch_size=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_forms_agree_with_the_joined_ones(layout, monkeypatch):
    """What other devices compute: all keys side by side in one call."""
    monkeypatch.setattr(decode, "_cascade", lambda *args: decode._dense(*args, None))
    same(network("llama"), LAYOUTS[layout], batch_size=4, expected=oracle("llama", layout, 14))


def test_a_tree_of_prompts_has_its_stems():
    found = stems.find(LAYOUTS["a tree"])
    assert sorted(stem.end for stem in found.stems) == [40, 70, 130]
    longest = next(stem for stem in found.stems if stem.end == 130)
    assert found.stems[longest.parent].end == 70
    assert sorted(found.order) == list(range(17))
    for row, leaf in enumerate(found.leaf):
        if leaf >= 0:
            stem = found.stems[leaf]
            assert len(LAYOUTS["a tree"][row]) > stem.end
            assert LAYOUTS["a tree"][row][: stem.end] == LAYOUTS["a tree"][stem.row][: stem.end]


def test_little_in_common_is_not_shared():
    assert not stems.find([[1, 2, 3, 4], [1, 2, 3, 5]]).stems
    assert not stems.find([[*range(60), n] for n in range(2)]).stems
    assert stems.find([[*range(60), n] for n in range(4)]).stems


def test_beginnings_are_computed_once_and_forgotten(monkeypatch):
    computed, batches = [], []
    usual = decode.begin_with
    monkeypatch.setattr(decode, "begin_with", lambda *args: computed.append(args) or usual(*args))
    init = refill.Batch.__init__
    monkeypatch.setattr(refill.Batch, "__init__", lambda self, *a, **k: batches.append(self) or init(self, *a, **k))
    generate(network("llama"), LAYOUTS["a tree"], decode=str, stop_ids=STOPS, max_new_tokens=6, batch_size=3)
    assert len(computed) == 4  # three stems, and nothing before the rows that share none
    (batch,) = batches
    assert not any(batch.kept.values())
    assert not batch.memory.lengths


def test_the_batch_stays_full_until_nobody_waits(monkeypatch):
    widths, usual = [], decode.forward

    def counted(model, ids, memory, **options):
        if not options:
            widths.append((len(ids), len(batches[0].waiting)))
        return usual(model, ids, memory, **options)

    batches, init = [], refill.Batch.__init__
    monkeypatch.setattr(refill.Batch, "__init__", lambda self, *a, **k: batches.append(self) or init(self, *a, **k))
    monkeypatch.setattr(decode, "forward", counted)
    generate(network("llama"), prompts(10, count=40), decode=str, stop_ids=STOPS, max_new_tokens=30, batch_size=8)
    full = [width for width, waiting in widths if waiting]
    assert sum(full) / len(full) >= 6  # of 8: a quarter may be free
    assert any(width < 4 for width, _ in widths)


def test_a_finished_row_costs_one_copy_at_most():
    memory = decode.Memory(capacity=3, room=4)
    for length in (2, 3, 4):
        memory.lengths[memory.add(None)] = length
    key, value = memory.layer(0, torch.zeros(1, 1, 1, 1))
    for row in range(3):
        key[row], value[row] = row + 1, -row - 1
    memory.drop(0)
    assert memory.lengths == [4, 3]
    assert key[:, 0, 0, 0].tolist()[:2] == [3, 2]
    memory.drop(1)
    assert memory.lengths == [4]
    assert value[0, 0, 0, 0] == -3


def test_half_precision_stays_close():
    model = network("llama").to(torch.bfloat16)
    answers = generate(model, LAYOUTS["a tree"], decode=str, stop_ids=frozenset(), max_new_tokens=4, batch_size=5)
    for prompt, answer in zip(LAYOUTS["a tree"], answers, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0].float()
        own = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(own.tolist(), abs=0.15)


def test_both_ends_happen():
    model = network("llama")
    found = generate(model, prompts(0, seed=1, count=12), decode=str, stop_ids=STOPS, max_new_tokens=12)
    assert {answer.stop for answer in found} == {"end", "length"}


def test_batches_do_not_change_answers():
    model = network("llama")
    asked = prompts(20, seed=5, count=7)
    together = generate(model, asked, decode=str, stop_ids=STOPS, max_new_tokens=16, batch_size=7)
    apart = generate(model, asked, decode=str, stop_ids=STOPS, max_new_tokens=16, batch_size=1)
    assert [a.ids for a in together] == [a.ids for a in apart]


def test_sampling_repeats_with_its_seed_and_differs_without():
    model = network("llama")
    asked = prompts(20, seed=7, count=3)

    def sampled(seed):
        found = generate(model, asked, decode=str, stop_ids=frozenset(), max_new_tokens=12, temperature=1.0, seed=seed)
        return [a.ids for a in found]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_what_a_row_draws_does_not_depend_on_its_company():
    model, asked = network("llama"), prompts(20, seed=7, count=9)

    def sampled(**options):
        found = generate(
            model, asked, decode=str, stop_ids=STOPS, max_new_tokens=12, temperature=1.0, seed=4, **options
        )
        return [a.ids for a in found]

    assert sampled(batch_size=9) == sampled(batch_size=1) == sampled(batch_size=4)


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([0.1, 0.2, 0.0, 0.7])).repeat(4000, 1)
    for temperature, wanted in ((1.0, [0.1, 0.2, 0.0, 0.7]), (0.5, [0.01 / 0.54, 0.04 / 0.54, 0.0, 0.49 / 0.54])):
        sampling = Sampling(temperature, seed=1)
        tokens, _ = choose(logits, sampling, [sampling.draws(row) for row in range(4000)])
        shares = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
        assert shares.tolist() == pytest.approx(wanted, abs=0.03)
        assert shares[2] == 0


def test_streaming_yields_what_generate_returns():
    model = network("qwen3")
    asked = prompts(12, seed=3, count=1)
    pieces = [token for _, token, _ in stream(model, asked, stop_ids=STOPS, max_new_tokens=10)]
    (answer,) = generate(model, asked, decode=str, stop_ids=STOPS, max_new_tokens=10)
    assert pieces[: len(answer.ids)] == list(answer.ids)


def test_a_model_that_cannot_share_still_answers():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    ).eval()
    asked = prompts(10, count=2)
    answers = generate(model, asked, decode=str, stop_ids=frozenset(), max_new_tokens=5)
    for prompt, answer in zip(asked, answers, strict=True):
        assert list(answer.ids) == one_by_one(model, prompt, 5)[0] or len(answer.ids) == 5
