"""The front half of `train`, `check` and `show`: from a task to rows that are read, split, guarded and rendered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier import registry, store
from luthier import spec as specs
from luthier.contracts import Objective, Template
from luthier.data import leaks as guard
from luthier.data.check import CheckReport, check
from luthier.data.read import FileInfo
from luthier.data.split import Split
from luthier.data.stream import Stream
from luthier.errors import DataError, Fault, SpecError
from luthier.flows.events import Listener, Note, silent
from luthier.flows.gather import SAMPLED, Gathered, gather, read_rows, sides_of
from luthier.records import Example, Rendered
from luthier.spec import DataSpec, RunSpec
from luthier.text import pack, show
from luthier.text.kept import render_kept
from luthier.text.render import Rendering, render
from luthier.text.tokenizer import Tokenizer
from luthier.training.feed import Plan, ShuffledFeed, StreamFeed


@dataclass
class Prepared:
    """All that training, checking and showing need to know about a task's rows.

    `split` tells the sides of the rows that were split (not of dev or test files). `rendering` holds the rows of train,
    dev and test one after the other, and `rendered_*` those of a side, parallel to its examples; many rows lie on disk
    (`text.kept`), and these are views of them. `separate` says why this architecture cannot share prefixes; empty where
    it can. Of a stream `train` holds the first rows only, for what must be known before: the instruction, examples to
    show, lengths.
    """

    spec: RunSpec
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    split: Split
    rendering: Rendering
    template: Template
    tokenizer: Tokenizer
    model_folder: Path
    context: int | None
    separate: str
    files: list[FileInfo]
    bad: list[Fault]  # rows that were left out because the task says `on_bad: skip`
    unrenderable: list[Fault]  # rows that were left out because the template cannot render them (`on_bad: skip`)
    leaks: list[guard.Leak]  # training rows that were taken out
    stream: Stream | None = None
    check: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rendered_train(self) -> Sequence[Rendered]:
        return self.rendering.rendered[: len(self.train)]

    @property
    def rendered_dev(self) -> Sequence[Rendered]:
        return self.rendering.rendered[len(self.train) : len(self.train) + len(self.dev)]

    @property
    def rendered_test(self) -> Sequence[Rendered]:
        return self.rendering.rendered[len(self.train) + len(self.dev) :]

    @cached_property
    def _places(self) -> dict[str, int]:
        """Where an example's row stands in the rendering."""
        return {example.id: place for place, example in enumerate((*self.train, *self.dev, *self.test))}

    @property
    def leaks_removed(self) -> int:
        return len(self.leaks)

    @property
    def skipped(self) -> int:
        return sum(info.skipped for info in self.files) + len(self.unrenderable)

    @property
    def quarantined(self) -> list[Example]:
        return self.split.quarantined

    @cached_property
    def data_hash(self) -> str:
        """Content hash of every side's rows, in order."""
        sides = [[example.id for example in side] for side in (self.train, self.dev, self.test)]
        return store.content_hash([*sides, self.stream.state()["files"] if self.stream else []])

    @cached_property
    def system(self) -> str | None:
        """The one instruction that all rows carry as their system message; None where they differ or have none."""
        told = {_system(example) for example in (*self.train, *self.dev, *self.test)}
        return told.pop() if len(told) == 1 else None

    @cached_property
    def hidden_system(self) -> str | None:
        """What the template says in the system's name to rows that have no system message."""
        without = any(_system(example) is None and example.prompt for example in (*self.train, *self.dev, *self.test))
        return show.hidden_system(self.template, self.tokenizer) if without else None

    @cached_property
    def objective(self) -> Objective:
        made: Objective = registry.make("objectives", self.spec.objective, "objective")
        return made

    def feed(self, *, share: bool, plan: Plan = pack.plan) -> ShuffledFeed | StreamFeed:
        """The training rows in the order of the run.

        An objective with rows of its own has them rendered here, so that none is at fault in the middle of the run.
        """
        settings = self.spec.train
        plain = type(self.objective).branches is Objective.branches
        if self.stream is not None:
            assert settings.max_steps is not None, "the spec asks for max_steps with a stream"
            return StreamFeed(
                self.stream,
                self.branches,
                batch_size=settings.batch_size,
                max_steps=settings.max_steps,
                budget=settings.tokens_per_pack,
                share=share,
                plan=plan,
            )
        return ShuffledFeed(
            self.rendered_train if plain else [self.branches(example) for example in self.train],
            batch_size=settings.batch_size,
            seed=settings.seed,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            budget=settings.tokens_per_pack,
            share=share,
            plan=plan,
        )

    def branches(self, example: Example) -> list[Rendered]:
        """The rows that the objective makes of one example; over-long ones are gone where the task drops them."""
        return [row for row in self.objective.branches(example, self._render) if row is not None]

    def facts(self) -> dict[str, Any]:
        """What the report tells about the data."""
        cut = [f"{example.origin}: {tokens} tokens, {where}" for example, tokens, where in self.rendering.cut]
        told: dict[str, Any] = {
            "files": [_file(info) for info in self.files],
            "rows": {
                "train": "streamed" if self.stream else len(self.train),
                "dev": len(self.dev),
                "test": len(self.test),
            },
            "template": self.template.name,
            "instruction_all_rows_share": self.system,
            "hidden_system_message": self.hidden_system,
            "bad_rows_skipped": self.skipped,
            "training_rows_removed_because_they_give_a_held_out_row_away": self.leaks_removed,
            "quarantined": [str(example.origin) for example in self.quarantined],
            "rows_cut": cut[:20],
            "rows_dropped_for_length": len(self.rendering.dropped),
        }
        return {key: value for key, value in told.items() if value not in (None, 0, [])}

    def _render(self, example: Example) -> Rendered | None:
        if (place := self._places.get(example.id)) is not None:
            return self.rendering.rendered[place]
        limit, data = limit_of(self.spec.data, self.context), self.spec.data
        return render(example, self.template, self.tokenizer, max_length=limit, truncate=data.truncate)


def prepare(
    spec: RunSpec, *, split_history: Mapping[str, str] | None = None, on_event: Listener | None = None
) -> Prepared:
    """Read, split, guard and render a task's rows; raise SpecError or DataError with every fault at once.

    `split_history` maps example ids to the sides that they had before (`split.json`'s `sides`); none of them moves.
    """
    tell = on_event or silent
    found = gather(spec, split_history=split_history, on_event=tell)
    prepared = assemble(found, guard.guard(found.sides.train, found.sides.dev, found.sides.test))
    parts = {"train": prepared.train, "dev": prepared.dev, "test": prepared.test}
    prepared.check = _remarks(check(parts, template=found.template.name, special=found.tokenizer.specials))
    require_rows(prepared)
    for note in notes(prepared):
        tell(note)
    return prepared


def assemble(found: Gathered, leaks: Sequence[guard.Leak], rendering: Rendering | None = None) -> Prepared:
    """Leave the leaking rows out and render the others (unless they are at hand); DataError with all that cannot be."""
    sides, data = found.sides, found.spec.data
    train = guard.without_leaks(sides.train, leaks)
    if rendering is None:
        rows = [*train, *sides.dev, *sides.test]
        rendering = render_rows(found, rows, limit=limit_of(data, found.context), skip=data.on_bad == "skip")
    gone = {example.id for example in (*rendering.dropped, *(example for example, _ in rendering.refused))}
    return Prepared(
        spec=found.spec,
        train=[example for example in train if example.id not in gone],
        dev=[example for example in sides.dev if example.id not in gone],
        test=[example for example in sides.test if example.id not in gone],
        split=_without_files(sides, data),
        rendering=rendering,
        template=found.template,
        tokenizer=found.tokenizer,
        model_folder=found.model_folder,
        context=found.context,
        separate=found.separate,
        files=found.files,
        bad=found.bad,
        unrenderable=[fault for _, fault in rendering.refused],
        leaks=list(leaks),
        stream=found.stream,
    )


def render_rows(found: Gathered, rows: Sequence[Example], *, limit: int | None = None, skip: bool = False) -> Rendering:
    """Render rows; with `skip` those that no template could render are left out and told, over-long ones never are."""
    return render_kept(rows, found.template, found.tokenizer, limit, found.spec.data.truncate, skip=skip)


def held_out(run: store.Run) -> list[Example]:
    """The test rows of a run, read again from its data and the sides that it stored."""
    spec = specs.load(run.spec)
    history = dict(store.read_json(run.split)["sides"]) if run.split.exists() else None
    return sides_of(spec.data, read_rows(spec.data), history).test


def limit_of(data: DataSpec, context: int | None) -> int | None:
    """The tokens that a row may have; raise SpecError where the task allows more than the model can read."""
    if data.max_length and context and data.max_length > context:
        raise SpecError(
            f"is {data.max_length}, but the model reads at most {context} tokens",
            where="data.max_length",
            remedy=f"write {context} or less",
        )
    return data.max_length or context


def require_rows(prepared: Prepared) -> None:
    """Raise DataError where a side that the run cannot do without is empty."""
    faults = []
    if not prepared.train and prepared.stream is None:
        faults.append(Fault("data.train", "no row is left to learn from", "add rows, or hold fewer of them out"))
    if not prepared.test:
        faults.append(Fault("data.test", "no row is left to judge by", "name a test file, or a share such as 0.15"))
    if faults:
        raise DataError("there are too few rows", faults=faults)


def notes(prepared: Prepared) -> list[Note]:
    """What a person should know about the rows before they are used."""
    told = []
    if prepared.skipped:
        told.append(Note(f"{prepared.skipped} bad rows are left out (data.on_bad: skip)", "warning"))
    if prepared.stream is not None:
        told.append(
            Note(f"rows of a stream are not compared with held-out rows, but for the first {SAMPLED}", "warning")
        )
    if prepared.leaks:
        first = "; ".join(str(leak) for leak in prepared.leaks[:3])
        many = "rows are" if len(prepared.leaks) > 1 else "row is"
        told.append(
            Note(f"{len(prepared.leaks)} training {many} left out: they give held-out rows away ({first})", "warning")
        )
    if prepared.quarantined:
        told.append(
            Note(f"{len(prepared.quarantined)} new rows are near rows of different sides and are not used", "warning")
        )
    if prepared.rendering.dropped:
        told.append(Note(f"{len(prepared.rendering.dropped)} over-long rows are dropped (data.truncate)", "warning"))
    if prepared.rendering.cut:
        told.append(Note(f"{len(prepared.rendering.cut)} over-long rows are cut (data.truncate)", "warning"))
    told += [Note(f"{text} ({count} rows)", "warning") for text, count in prepared.rendering.notes.items()]
    told += [Note(text, "warning") for text in prepared.rendering.remarks]
    if prepared.hidden_system:
        told.append(Note(f"the template adds a system message of its own: {prepared.hidden_system!r}"))
    return told


def _without_files(sides: Split, data: DataSpec) -> Split:
    """Only what the split decided: rows of dev and test files are on their sides by their files."""
    dev = [] if isinstance(data.dev, list) else sides.dev
    test = [] if isinstance(data.test, list) else sides.test
    train = [] if data.stream else sides.train
    return dataclasses.replace(sides, train=train, dev=dev, test=test)


def _remarks(found: CheckReport) -> dict[str, list[str]]:
    """What a check says about the rows that are used, for the report."""
    told: dict[str, list[str]] = {}
    for finding in found.findings:
        told.setdefault(f"{finding.severity}s", []).append(f"{finding.what}; {finding.remedy}".rstrip("; "))
    return told


def _system(example: Example) -> str | None:
    return next((message.content for message in example.prompt if message.role == "system"), None)


def _file(info: FileInfo) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": Path(info.path).name,
        "rows": info.rows,
        "format": info.format,
        "encoding": info.encoding,
        "sha256": info.sha256,
    }
    if info.skipped:
        told["skipped"] = info.skipped
    if info.passed_over:
        told["passed_over"] = info.passed_over
    if info.unused:
        told["unused_columns"] = ", ".join(info.unused)
    return told
