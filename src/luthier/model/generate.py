"""Answers to prompts: shared beginnings computed once, a batch that stays full, guesses of tokens where they pay.

How rows run is in `refill`, what they keep in `decode`, which beginnings are shared in `stems`, guesses in `lookup`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch

from luthier.errors import ModelError
from luthier.model.attention import shares_prefixes
from luthier.model.draw import Sampling, choose
from luthier.model.refill import Batch, Event
from luthier.model.soft import cache_name
from luthier.records import Completion

TOGETHER = 32  # rows in work at a time


@torch.inference_mode()
def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Set[int],
    max_new_tokens: int,
    batch_size: int = TOGETHER,
    temperature: float = 0.0,
    seed: int = 0,
    guess: bool = True,
) -> Iterator[Event]:
    """Yield (row, token, log-probability) as tokens are chosen, up to `batch_size` rows at a time; stop tokens too.

    Greedy at temperature 0; otherwise what a row draws depends on `seed` and its number only. Greedy answers are the
    same with and without `guess`, which checks several tokens in one pass where that is faster. Raises ModelError for
    architectures whose attention cannot be exchanged.
    """
    if reason := shares_prefixes(model):
        raise ModelError(f"cannot generate with a shared prompt: {reason}", remedy="use generate(), which falls back")
    if not prompts:
        return
    batch = Batch(
        model,
        prompts,
        stop_ids=stop_ids,
        limit=max_new_tokens,
        capacity=batch_size,
        sampling=Sampling(temperature, seed),
        guesses=guess and temperature == 0,
    )
    yield from batch.events()


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    decode: Callable[[Sequence[int]], str],
    stop_ids: Set[int],
    max_new_tokens: int,
    batch_size: int = TOGETHER,
    temperature: float = 0.0,
    seed: int = 0,
    guess: bool = True,
    on_done: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answer all prompts (token ids) in order; see `stream`. `on_done(n)` hears how many rows are finished."""
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    done = 0
    run = _one_by_one if shares_prefixes(model) else stream
    events = run(
        model, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, batch_size=batch_size,
        temperature=temperature, seed=seed, guess=guess,
    )  # fmt: skip
    for row, token, logprob in events:
        tokens[row].append(token)
        logprobs[row].append(logprob)
        if token in stop_ids or len(tokens[row]) == max_new_tokens:
            done += 1
            if on_done:
                on_done(done)
    return [_completion(ids, tuple(found), stop_ids, decode) for ids, found in zip(tokens, logprobs, strict=True)]


def _completion(
    ids: list[int], logprobs: tuple[float, ...], stop_ids: Set[int], decode: Callable[[Sequence[int]], str]
) -> Completion:
    ended = bool(ids) and ids[-1] in stop_ids
    kept = ids[:-1] if ended else ids
    return Completion(decode(kept), tuple(kept), "end" if ended else "length", logprobs)


@torch.inference_mode()
def _one_by_one(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Set[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    **unused: Any,
) -> Iterator[Event]:
    """Row by row with the model's own cache, where its attention cannot be exchanged."""
    sampling, name = Sampling(temperature, seed), cache_name(model)
    for row, prompt in enumerate(prompts):
        ids, cache, draws = torch.tensor([list(prompt)], device=model.device), None, sampling.draws(row)
        for _ in range(max_new_tokens):
            out = model(input_ids=ids, use_cache=True, **({name: cache} if cache is not None else {}))
            cache = out.get("cache", out.get("past_key_values"))
            (token,), (logprob,) = choose(out.logits[:, -1].float(), sampling, [draws])
            yield row, token, logprob
            if token in stop_ids:
                break
            ids = torch.tensor([[token]], device=model.device)
