"""`luthier bench evaluate` and `luthier bench generate`: how fast the base answers here, against what it could at most.

Reading prompts is bound by matrix products, answering at small batches by reading the weights once for every token.
Both are told apart by answering the same prompts with one token and with all of them.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UsageError
from luthier.evaluate import predict
from luthier.flows import train as flow
from luthier.flows.bench import machine, scaled
from luthier.flows.events import Listener, Stage, silent
from luthier.flows.judge import Judge
from luthier.flows.prepare import prepare
from luthier.records import Completion
from luthier.spec import RunSpec

if TYPE_CHECKING:
    from luthier.model.limit import Reading, Spread

ROUNDS = 3
BATCHES = (1, 8, 32)  # rows that are answered together
TOKENS, PROMPT = 32, 64  # new ones of a row; of a made-up prompt
ROWS = 64
NEVER: frozenset[int] = frozenset()  # no token ends an answer


@dataclass(frozen=True)
class Limits:
    """What this machine could do at most with one model: operations and bytes a second."""

    model: Any
    reading: Reading
    bytes_a_second: Spread

    @classmethod
    def of(cls, model: Any, tell: Listener) -> Limits:
        """Measure how fast this model's device reads memory."""
        from luthier.model import limit

        tell(Stage("measure the limit", "reading memory"))
        return cls(model, limit.reading(model), limit.read_speed(device=model.device))

    def products(self, tokens: int, positions: int) -> tuple[float, Spread]:
        """Operations of one pass over so many tokens, and the speed that its shapes allow."""
        from luthier.model import limit

        work = self.reading.products(max(1, tokens), max(1, positions))
        found = limit.measure(work, dtype=self.model.dtype, device=self.model.device)
        return sum(times * one.flops for one, times in work.items()), found.rate

    def step_seconds(self, rows: int) -> float:
        """The least time of one new token for each row: all weights are read once, and multiplied."""
        flops, rate = self.products(rows, rows)
        return max(self.reading.weights / self.bytes_a_second.median, flops / rate.median)


def evaluate(
    spec: RunSpec, *, rows: int = ROWS, rounds: int = ROUNDS, on_event: Listener | None = None
) -> dict[str, Any]:
    """Measure how long the base takes to answer test rows, as `luthier train` lets it: prompts, answers, scoring."""
    tell = on_event or silent
    prepared = prepare(spec, on_event=tell)
    base, _ = flow.load_base(spec, prepared, tell)
    judge = Judge(
        examples=prepared.test, shots_from=prepared.train, template=prepared.template, tokenizer=prepared.tokenizer,
        settings=spec.evaluate.model_copy(update={"limit": rows}), folder=Path(), identity={},
        context=prepared.context, rendered=prepared.rendered_test,
    )  # fmt: skip
    prompts, batch = [judge.prompt(example) for example in judge.examples], spec.evaluate.batch_size
    limits = Limits.of(base, tell)
    tell(Stage("answer", f"{len(prompts)} test rows, {rounds} times"))
    asked = _Asked(base, prompts, batch, judge.max_new_tokens, prepared.tokenizer.stop_ids, prepared.tokenizer.decode)
    turns = asked.turns(rounds)
    begun = time.perf_counter()
    judge.scored(predict.pair(judge.examples, turns.answers))
    scoring = time.perf_counter() - begun
    return {
        "task": spec.name,
        "base": spec.model.name,
        "machine": machine(base),
        "rows": len(prompts),
        "batch_size": batch,
        "max_new_tokens": judge.max_new_tokens,
        **turns.told(limits, asked),
        "scoring_seconds": scoring,
    }


def generate(
    spec: RunSpec | None = None, *, model: str | None = None, batches: Sequence[int] = BATCHES, tokens: int = TOKENS,
    rounds: int = ROUNDS, on_event: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure reading prompts and making tokens at several batch sizes: of a task's rows, or of made-up prompts."""
    if (spec is None) == (model is None):
        raise UsageError("either a task or a model is measured", remedy="give TASK, or --model NAME")
    tell = on_event or silent
    base, prompts = _of_task(spec, tell) if spec else _made_up(str(model), max(batches), tell)
    limits, told = Limits.of(base, tell), []
    for size in batches:
        tell(Stage("answer", f"{size} at a time, {tokens} tokens each"))
        chosen = [prompts[index % len(prompts)] for index in range(size)]
        asked = _Asked(base, chosen, size, tokens, NEVER, lambda ids: "", guess=False)
        told.append({"batch_size": size, "rows": size, **asked.turns(rounds).told(limits, asked)})
    return {
        "task": spec.name if spec else None,
        "base": spec.model.name if spec else model,
        "machine": machine(base),
        "new_tokens": tokens,
        "memory_gb_a_second": scaled(limits.bytes_a_second, 1e-9),
        "batches": told,
    }


def _of_task(spec: RunSpec, tell: Listener) -> tuple[Any, list[tuple[int, ...]]]:
    prepared = prepare(spec, on_event=tell)
    base, _ = flow.load_base(spec, prepared, tell)
    return base, [row.ids[: row.prompt_length] for row in (*prepared.rendered_test, *prepared.rendered_train)]


def _made_up(name: str, rows: int, tell: Listener) -> tuple[Any, list[tuple[int, ...]]]:
    """A model and prompts of tokens drawn at random, which share nothing."""
    from luthier.model import catalog, load

    tell(Stage("load the base", name))
    base = load.load_model(catalog.locate(name))
    draw = random.Random(0)  # noqa: S311 - a sample, no secret
    count = base.config.get_text_config().vocab_size
    return base, [tuple(draw.randrange(count) for _ in range(PROMPT)) for _ in range(rows)]


@dataclass(frozen=True)
class _Asked:
    """A model, what it is asked, and how its answers end."""

    model: Any
    prompts: Sequence[Sequence[int]]
    batch: int
    most: int  # new tokens
    stop_ids: frozenset[int] | set[int]
    decode: Any
    guess: bool = True

    def answer(self, most: int) -> tuple[float, list[Completion]]:
        """Seconds of answering all prompts with at most so many tokens."""
        from luthier.model.generate import generate as answers

        begun = time.perf_counter()
        found = answers(
            self.model, self.prompts, decode=self.decode, stop_ids=self.stop_ids, max_new_tokens=most,
            batch_size=self.batch, guess=self.guess,
        )  # fmt: skip
        return time.perf_counter() - begun, found

    def turns(self, rounds: int) -> _Turns:
        """Answer with one token and with all of them, in turns, after a round that chooses kernels."""
        self.answer(min(2, self.most))
        firsts, wholes, found = [], [], list[Completion]()
        for _ in range(rounds):
            firsts.append(self.answer(1)[0])
            whole, found = self.answer(self.most)
            wholes.append(whole)
        return _Turns(firsts, wholes, found)

    def needed(self) -> tuple[int, int]:
        """Prompt tokens that must be computed where what prompts begin with alike costs once, and pairs they see."""
        tokens = pairs = 0
        before: Sequence[int] = ()
        for prompt in sorted(map(tuple, self.prompts)):
            limit = min(len(before), len(prompt) - 1)
            common = next((i for i in range(limit) if before[i] != prompt[i]), limit)
            tokens += len(prompt) - common
            pairs += sum(range(common + 1, len(prompt) + 1))
            before = prompt
        return tokens, pairs


@dataclass(frozen=True)
class _Turns:
    """Seconds of one token and of all tokens for each row, and the answers."""

    firsts: Sequence[float]
    wholes: Sequence[float]
    answers: Sequence[Completion]

    def told(self, limits: Limits, asked: _Asked) -> dict[str, Any]:
        """The figures, with what would be possible at most."""
        from luthier.model.limit import Spread

        made = sum(len(one.ids) + (one.stop == "end") for one in self.answers)
        return {
            "seconds": Spread.of(self.wholes).as_dict(),
            "rows_a_second": Spread.of(len(asked.prompts) / whole for whole in self.wholes).as_dict(),
            "new_tokens": made,
            "new_tokens_a_second": Spread.of(made / whole for whole in self.wholes).as_dict(),
            "prefill": self._prefill(limits, asked),
            "decode": self._decode(limits, asked, made - len(asked.prompts)),
        }

    def _prefill(self, limits: Limits, asked: _Asked) -> dict[str, Any]:
        """Reading the prompts: work is that of tokens that no other prompt begins with, and one head position a row."""
        from luthier.model.limit import Spread

        tokens, pairs = asked.needed()
        count, rows = sum(map(len, asked.prompts)), len(asked.prompts)
        batches = math.ceil(rows / asked.batch)
        flops, rate = limits.products(tokens // batches, rows // batches)
        work = batches * flops + 4.0 * _width(limits.model) * pairs
        speeds = [work / seconds for seconds in self.firsts]
        return {
            "seconds": Spread.of(self.firsts).as_dict(),
            "prompt_tokens": count,
            "needed_tokens": tokens,
            "tokens_a_second": Spread.of(count / seconds for seconds in self.firsts).as_dict(),
            "gflop": work / 1e9,
            "gflops": Spread.of(speed / 1e9 for speed in speeds).as_dict(),
            "limit_gflops": scaled(rate, 1e-9),
            "share_of_limit": Spread.of(speed / rate.median for speed in speeds).as_dict(),
        }

    def _decode(self, limits: Limits, asked: _Asked, tokens: int) -> dict[str, Any] | None:
        """Tokens after each row's first one; None where there are none."""
        from luthier.model.limit import Spread

        rest = [max(whole - first, 1e-9) for first, whole in zip(self.firsts, self.wholes, strict=True)]
        if tokens <= 0:
            return None
        rows = min(asked.batch, len(asked.prompts))
        least = tokens / rows * limits.step_seconds(rows)
        return {
            "seconds": Spread.of(rest).as_dict(),
            "tokens": tokens,
            "tokens_a_second": Spread.of(tokens / seconds for seconds in rest).as_dict(),
            "limit_tokens_a_second": tokens / least,
            "share_of_limit": Spread.of(least / seconds for seconds in rest).as_dict(),
            "weights_bytes": limits.reading.weights,
            "memory_gb_a_second": limits.bytes_a_second.median / 1e9,
        }


def _width(model: Any) -> float:
    """Numbers that one pair of tokens multiplies in attention, over all layers; windows are not taken off."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return float(heads * size * config.num_hidden_layers)


def batch_sizes(text: str) -> list[int]:
    """`1,8,32` as numbers; UsageError for anything else."""
    try:
        sizes = [int(one) for one in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(f"'{text}' is not a list of batch sizes", where="--batches", remedy="write 1,8,32")
    return sizes
