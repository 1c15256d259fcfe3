"""Generation with a shared prompt equals the model's own, token by token."""

from __future__ import annotations

import random

import pytest
import torch
from networks import KINDS, VOCABULARY, network

from luthier.model.generate import generate, stream

STOPS = frozenset(range(3, 12))


def prompts(shared: int, seed: int = 0, count: int = 6) -> list[list[int]]:
    rng = random.Random(seed)
    stem = [rng.randrange(VOCABULARY) for _ in range(shared)]
    return [stem + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 20))] for _ in range(count)]


@torch.no_grad()
def one_by_one(model, prompt, limit):
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in STOPS:
            return ids[len(prompt) : -1], "end"
    return ids[len(prompt) :], "length"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [0, 30])
def test_answers_equal_the_models_own(kind, shared):
    model = network(kind)
    asked = prompts(shared)
    answers = generate(model, asked, decode=str, stop_ids=STOPS, max_new_tokens=24, batch_size=4)
    for prompt, answer in zip(asked, answers, strict=True):
        ids, stop = one_by_one(model, prompt, 24)
        assert list(answer.ids) == ids
        assert answer.stop == stop
        assert len(answer.logprobs) == len(ids) + (stop == "end")


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
