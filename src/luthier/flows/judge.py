"""Let systems answer the held-out rows: the base, the base with examples shown, the tuned model. Answers are kept.

A system's answers are stored with a key of everything that decided them, so a resumed run or a new metric pays for
no token twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier import registry, store
from luthier.contracts import Scorer, Template
from luthier.errors import Fault, SpecError
from luthier.evaluate import predict
from luthier.flows.events import Answering, Listener, Note
from luthier.flows.team import Team
from luthier.records import Completion, Example, Message, Origin, Prediction, Rendered
from luthier.spec import EvaluateSpec
from luthier.text.render import render, render_prompt
from luthier.text.tokenizer import Tokenizer

MARGIN = 1.5  # room over the 99th percentile of the wanted answers' lengths
LEAST_TOKENS = 16
MOST_CHOICES = 500
SHOWN = 8


@dataclass
class Judge:
    """The items, the way they are asked, and the scorers."""

    examples: Sequence[Example]
    shots_from: Sequence[Example]  # training rows: what few-shot prompts show, and how long answers are
    template: Template
    tokenizer: Tokenizer
    settings: EvaluateSpec
    folder: Path  # where answers are kept
    identity: dict[str, Any]  # base, template and tokenizer hashes: part of every key
    context: int | None = None  # tokens the model can read
    rendered: Sequence[Rendered] = ()  # the items as they were rendered, cut where the task allows it
    team: Team = field(default_factory=Team)  # the processes that answer together
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [self.settings.primary, *(name for name in self.settings.also if name != self.settings.primary)]
        self.scorers: dict[str, Scorer] = {name: registry.make("scorers", name) for name in names}
        if self.settings.limit:
            self.examples = sorted(self.examples, key=lambda example: example.id)[: self.settings.limit]
        self.max_new_tokens = self.settings.max_new_tokens or self._usual_length()
        self.choices = self._choices()
        self.shots = self._shots()
        self._ids = {row.example_id: row.ids[: row.prompt_length] for row in self.rendered}

    def check(self) -> dict[str, float | None]:
        """Prove metrics and choices on these answers, before any token is paid for; each metric's chance level."""
        if self.choices and self.settings.choices != "train":
            self._require_chosen()
        return predict.self_check(self.scorers, [example.answer for example in self.examples])

    def answers(
        self, system: str, model: Any, listener: Listener, *, key: Any, shots: bool = False
    ) -> list[Prediction]:
        """Answers of one system with scores, from the store where nothing that matters has changed."""
        prompts = [self.prompt(example, shots) for example in self.examples]
        decoding = self._decoding()
        wanted = store.content_hash([self.identity, decoding, key, prompts, [e.id for e in self.examples]])
        path = self.folder / f"{system}.jsonl"
        about = self.folder / f"{system}.json"
        told = store.read_json(about) if about.exists() and path.exists() else {}
        if self.team.agreed(told.get("key") == wanted):
            self.seconds[system] = told["seconds"]
            return self.scored(predict.load(path))
        started = time.perf_counter()
        completions = self.team.answers(prompts, lambda some: self._generate(system, model, some, listener))
        self.seconds[system] = time.perf_counter() - started
        predictions = predict.pair(self.examples, completions)
        if self.team.first:
            predict.save(path, predictions)
            store.write_json(about, {"key": wanted, "seconds": self.seconds[system], **decoding})
        return self.scored(predictions)

    def _decoding(self) -> dict[str, Any]:
        told = {"max_new_tokens": self.max_new_tokens, "temperature": 0.0, "batch_size": self.settings.batch_size}
        return {**told, "choices": self.choices} if self.choices else told

    def scored(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """Fill in the scores."""
        return predict.score_all(predictions, self.scorers, self.examples)

    def prompt(self, example: Example, shots: bool = False) -> tuple[int, ...]:
        """Token ids of an item's prompt, with the shown examples between system message and question if asked."""
        if not shots and example.id in self._ids:
            return self._ids[example.id]
        turns = example.prompt
        if shots:
            system = tuple(m for m in turns if m.role == "system")
            shown = (m for shot in self.shots for m in shot.messages if m.role != "system")
            turns = (*system, *shown, *(m for m in turns if m.role != "system"))
        return render_prompt(turns, example.tools, self.template, self.tokenizer)

    def _generate(
        self, system: str, model: Any, prompts: Sequence[Sequence[int]], listener: Listener
    ) -> list[Completion]:
        """Answer the prompts, with an adapter folded into the weights where there is work enough."""
        from luthier.adapt.folded import folded
        from luthier.model.generate import generate

        with folded(model, prompts, self.max_new_tokens) as folding:
            if folding.why:
                listener(Note(f"{system} answers with its adapter attached, which is slower: {folding.why}"))
            if self.choices:
                return self._choose(model, prompts)
            return generate(
                model,
                prompts,
                decode=lambda ids: self.tokenizer.decode(ids).strip(),
                stop_ids=self.tokenizer.stop_ids,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.settings.batch_size,
                on_done=lambda done: listener(Answering(system, done, len(prompts))),
            )

    def _choose(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """The most likely of the choices behind each prompt; nothing else is ever said."""
        from luthier.model.choices import choose

        labels = [answer_ids(text, None, self.template, self.tokenizer) for text in self.choices]
        found = choose(model, prompts, labels, batch_size=self.settings.batch_size)
        return [Completion(self.choices[at], labels[at], "end", (logprob,)) for at, logprob in found]

    def _choices(self) -> list[str]:
        """The texts that answers are chosen from; empty where answers are free."""
        asked = self.settings.choices
        texts = [e.answer for e in self.shots_from] if asked == "train" else asked or []
        unique = sorted({text.strip() for text in texts} - {""})
        if asked is not None and not 2 <= len(unique) <= MOST_CHOICES:
            what = f"gives {len(unique)} different answers to choose from, and 2 to {MOST_CHOICES} can be"
            raise SpecError(what, where="evaluate.choices", remedy="leave it out: answers are then generated")
        return unique

    def _require_chosen(self) -> None:
        """Every wanted answer must be among the written choices, or it could not be given."""
        known = set(self.choices)
        lost = [example for example in self.examples if example.answer.strip() not in known]
        faults = [Fault(str(e.origin), f"the answer {e.answer[:60]!r} is not a choice") for e in lost[:SHOWN]]
        if lost:
            what = f"{len(lost)} held-out rows have an answer that is not among the choices"
            raise SpecError(what, where="evaluate.choices", faults=faults, remedy="add it to evaluate.choices")

    def _usual_length(self) -> int:
        golds = [*self.examples, *self.shots_from[:2000]]
        lengths = sorted(len(self.tokenizer.encode(example.answer)) + 1 for example in golds)
        if not lengths:
            return LEAST_TOKENS
        return max(LEAST_TOKENS, math.ceil(MARGIN * lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]))

    def _shots(self) -> list[Example]:
        """Examples to show: of middling length, chosen by content, so that the choice is fixed and unremarkable."""
        alone = [e for e in self.shots_from if sum(m.role == "assistant" for m in e.messages) == 1 and e.prompt]
        by_length = sorted(alone, key=lambda e: (len(e.question) + len(e.answer), e.id))
        middle = by_length[len(by_length) // 4 : max(1, 3 * len(by_length) // 4)]
        return sorted(middle, key=lambda e: e.id)[: self.settings.few_shot]

    def fits(self) -> bool:
        """Whether few-shot prompts leave room for an answer within the model's context."""
        if not self.shots:
            return False
        longest = max((len(self.prompt(example, True)) for example in self.examples), default=0)
        return self.context is None or longest + self.max_new_tokens <= self.context


def answer_ids(text: str, system: str | None, template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of an answer as training rows have it, with its end token."""
    turns = (*user_turns("", system), Message("assistant", text))
    row = render(Example(turns, Origin("choices")), template, tokenizer)
    assert row is not None, "nothing is dropped without a limit"
    return row.ids[row.prompt_length :]


def user_turns(text: str, system: str | None) -> tuple[Message, ...]:
    """A question as messages, under the task's instruction where there is one."""
    head = (Message("system", system),) if system else ()
    return (*head, Message("user", text))
