"""Use a tuned model: `luthier generate`, `luthier chat`, and `luthier.load(run)`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from luthier import spec as specs
from luthier import store
from luthier.contracts import Adapted, Template
from luthier.errors import UsageError
from luthier.flows.judge import answer_ids, user_turns
from luthier.hub import cards
from luthier.records import AdapterCard, Completion, Message
from luthier.text import show
from luthier.text.render import render_prompt
from luthier.text.tokenizer import Tokenizer


class Tuned:
    """A base with a run's adapter on it, asked through the template that the adapter was trained with."""

    def __init__(self, run: store.Run, *, with_adapter: bool = True) -> None:
        from luthier.model import catalog, load

        if not (run.adapter / cards.CARD).is_file():
            raise UsageError(
                "has no adapter yet", where=str(run.folder), remedy="finish it: luthier train ... --resume"
            )
        self.run = run
        self.spec = specs.load(run.spec)
        self.card: AdapterCard = cards.read(run.adapter)
        self.template: Template = cards.template_of(run.adapter, self.card)
        self.tokenizer = Tokenizer.from_folder(run.adapter)
        asked = self.spec.model
        folder = catalog.locate(asked.name, revision=asked.revision)
        cards.require_base(self.card, catalog.base_hash(folder), run.adapter)
        base = load.load_model(
            folder, dtype=self.card.dtype, device=asked.device, trust_remote_code=asked.trust_remote_code,
            quantize=self.quantize,
        )  # fmt: skip
        self.adapted: Adapted | None = None
        if with_adapter:
            self.adapted = method_of(self.card).load(base, run.adapter)
            self.adapted.model.eval()
        self.model: Any = self.adapted.model if self.adapted else base

    @property
    def quantize(self) -> specs.QuantizeSpec:
        """How the base's matrices are kept: as in training; a base that is quantised on disk stays as it is."""
        return specs.QuantizeSpec(**self.card.quantize) if self.spec.quantize.name != "none" else self.spec.quantize

    @property
    def system(self) -> str | None:
        """The task's instruction, as the training rows carried it."""
        return self.card.metrics.get("system") or self.spec.data.system

    def answer(self, question: str | Sequence[Message], *, max_new_tokens: int = 256, temperature: float = 0.0) -> str:
        """Answer one question (or conversation) and return the text."""
        return self.answers([question], max_new_tokens=max_new_tokens, temperature=temperature)[0].text

    def answers(
        self,
        questions: Sequence[str | Sequence[Message]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Completion]:
        """Answer many questions: what they share is computed once, the adapter is folded in where that pays."""
        from luthier.adapt.folded import folded
        from luthier.model.generate import generate

        prompts = [self.prompt(question) for question in questions]
        with folded(self.model, prompts, max_new_tokens) as folding:
            if folding.why:
                warnings.warn(f"answers with the adapter attached, which is slower: {folding.why}", stacklevel=2)
            return generate(
                self.model,
                prompts,
                decode=lambda ids: self.tokenizer.decode(ids).strip(),
                stop_ids=self.tokenizer.stop_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
            )

    def choose(self, questions: Sequence[str | Sequence[Message]], choices: Sequence[str]) -> list[tuple[str, float]]:
        """Answer each question with the most likely of `choices`; returns it and its log-probability.

        Unlike `answers` this never says anything else, and costs little more than the prompts.
        """
        from luthier.adapt.folded import folded
        from luthier.model.choices import choose

        prompts = [self.prompt(question) for question in questions]
        labels = [answer_ids(text, self.system, self.template, self.tokenizer) for text in choices]
        with folded(self.model, prompts, max(map(len, labels), default=0)):
            found = choose(self.model, prompts, labels)
        return [(choices[label], logprob) for label, logprob in found]

    def stream(
        self, messages: Sequence[Message], *, max_new_tokens: int = 256, temperature: float = 0.0
    ) -> Iterator[str]:
        """Answer a conversation piece by piece; pieces join to the whole answer."""
        from luthier.model.generate import stream

        ids: list[int] = []
        shown = ""
        events = stream(
            self.model,
            [self.prompt(messages)],
            stop_ids=self.tokenizer.stop_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        for _, token, _ in events:
            if token in self.tokenizer.stop_ids:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a character may need several tokens
                yield text[len(shown) :]
                shown = text

    def prompt(self, question: str | Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a question's prompt; exactly what training saw before an answer."""
        messages = user_turns(question, self.system) if isinstance(question, str) else tuple(question)
        return render_prompt(messages, (), self.template, self.tokenizer)


def method_of(card: AdapterCard) -> Any:
    """The method that made an adapter, with its options."""
    from luthier import registry

    return registry.make("methods", card.method, "method")


def load(run: str | Path) -> Tuned:
    """Load a run's tuned model by folder or name, ready to answer."""
    return Tuned(store.open_run(run))


def generate(
    run: str | Path,
    prompts: Sequence[str],
    *,
    base: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Completion]:
    """Answer prompts with a run's tuned model, or with its bare base for comparison."""
    tuned = Tuned(store.open_run(run), with_adapter=not base)
    return tuned.answers(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def chat(run: str | Path, *, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
    """Talk to a run's tuned model in the terminal until an empty line or end of file."""
    tuned = Tuned(store.open_run(run))
    turns: list[Message] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        asked = [*turns, Message("user", text)]
        head = [Message("system", tuned.system)] if tuned.system else []
        said = ""
        for piece in tuned.stream([*head, *asked], max_new_tokens=max_new_tokens, temperature=temperature):
            print("\n".join(map(show.visible, piece.split("\n"))), end="", flush=True)
            said += piece
        print()
        turns = [*asked, Message("assistant", said)]
