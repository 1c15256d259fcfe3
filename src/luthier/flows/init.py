"""`luthier init DIR --data FILE`: look at a person's file and write a task YAML whose every line says why."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from luthier import spec as specs
from luthier import store
from luthier.data import columns, profile
from luthier.data.read import Dataset, File, Parsing, read
from luthier.errors import DataError, LuthierError, UsageError
from luthier.model import catalog
from luthier.records import Example, Row
from luthier.text.words import script

LOOKED_AT = 200  # rows from which columns are guessed
MOSTLY = 0.9
LABEL_LENGTH, MANY_LABELS = 60, 0.2  # characters of a label; distinct answers per row from which they are no labels
PROSE_LENGTH = 200
MANY_TEST, LIMIT = 400, 300
WANTED_TEST = 100  # held-out rows that an interval of useful width needs
TAGS = range(2, 21)  # distinct values of a column that slices a report
DEFAULT_MODEL, EAST_ASIAN_MODEL = "smollm2-135m", "qwen2.5-0.5b"
SIDES = {"dev": ("dev", "valid", "validation", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Task:
    """The kind of task and the metrics that fit it, with the evidence."""

    kind: str
    primary: str
    also: tuple[str, ...]
    why: str


@dataclass
class _Lines:
    """A YAML with a comment behind or above each line."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str, why: str = "") -> None:
        self.lines.append(f"{line:<38} # {why}" if why and len(line) < 38 else f"{line}  # {why}" if why else line)


def init(folder: str | Path, data: str | Path, *, model: str | None = None) -> dict[str, Any]:
    """Write `folder/task.yaml` for a file of examples and return what was seen and decided.

    Raises UsageError where the YAML exists already, DataError where no layout can be made out.
    """
    target, file = Path(folder) / "task.yaml", Path(data)
    if target.exists():
        raise UsageError("exists already and is not overwritten", where=str(target), remedy="name another folder")
    dataset, guessed = _read(file)
    rows = dataset.examples
    if not rows:
        raise DataError("no row of it can be used", where=str(file), faults=dataset.faults)
    task = kind_of([row.answer for row in rows])
    others = _siblings(file)
    text = "\n".join(_yaml(Path(folder), file, dataset, guessed, task, others, model)) + "\n"
    store.write_text(target, text)
    try:
        specs.load(target)
    except LuthierError:
        target.unlink()  # nothing is left that cannot be used
        raise
    return {
        "task": str(target),
        "file": str(file),
        "rows": len(rows),
        "bad_rows": dataset.skipped,
        "format": dataset.files[0].format,
        "encoding": dataset.files[0].encoding,
        "kind": task.kind,
        "primary": task.primary,
        "why": task.why,
        "next": f"luthier check {target}",
    }


def kind_of(answers: Sequence[str]) -> Task:
    """Tell from its answers what a task is, and how it is judged."""
    total, distinct = len(answers), len(set(answers))
    objects = sum(_is_record(answer) for answer in answers)
    middle = sorted(map(len, answers))[total // 2]
    if objects >= MOSTLY * total:
        why = (
            f"{objects} of {total} answers are JSON: the share of fields that are right tells more than all or nothing"
        )
        return Task("records", "json_fields", ("exact",), why)
    if middle <= LABEL_LENGTH and distinct <= max(2, MANY_LABELS * total):
        common, count = Counter(answers).most_common(1)[0]
        why = (
            f"{distinct} distinct short answers in {total} rows; the commonest, {common[:30]!r}, is {count / total:.0%}"
        )
        return Task("labels", "exact", ("f1",), why)
    if middle <= PROSE_LENGTH and middle <= LABEL_LENGTH:
        return Task(
            "short answers", "f1", ("exact",), f"short answers (median {middle} characters), {distinct} distinct"
        )
    return Task("prose", "rouge", ("chrf",), f"long answers (median {middle} characters): judged by their overlap")


def _read(file: Path) -> tuple[Dataset, tuple[str, str] | None]:
    """Read a file whatever its layout; the second result are columns that had to be guessed."""
    try:
        return read([file], on_bad="skip"), None
    except DataError as error:
        if not file.is_file():
            raise
        rows = [row.value for row in islice(File(file, Parsing()).rows(), LOOKED_AT) if isinstance(row, Row)]
        pair = columns.guess(rows)
        if not all(pair):
            raise
        try:
            return read([file], columns={"prompt": pair[0], "answer": pair[1]}, on_bad="skip"), pair
        except LuthierError:
            raise error from None


def _siblings(file: Path) -> dict[str, Path]:
    """Dev and test files that lie beside a training file."""
    if "train" not in file.name.lower():
        return {}
    found: dict[str, Path] = {}
    for side, words in SIDES.items():
        names = (re.sub("train", word, file.name, flags=re.IGNORECASE) for word in words)
        paths = [path for name in names if (path := file.with_name(name)).is_file()]
        found |= {side: paths[0]} if paths else {}
    return found


def _yaml(
    folder: Path, file: Path, dataset: Dataset, guessed: tuple[str, str] | None, task: Task,
    others: Mapping[str, Path], model: str | None,
) -> list[str]:  # fmt: skip
    rows, info = dataset.examples, dataset.files[0]
    told = _Lines()
    told.add(
        f"# {len(rows):,} usable rows in {file.name} ({info.format}, {info.encoding}). Next: luthier check, then train."
    )
    told.add("# Every setting: luthier schema, and docs/train.md.")
    told.add(f"name: {_name(folder)}", "the run's folder below runs/")
    told.add(f"model: {_model(model, rows)[0]}", _model(model, rows)[1])
    told.add("data:")
    told.add(f"  train: {_quoted(os.path.relpath(file, folder))}")
    for side in ("dev", "test"):
        told.add(*_held_out(side, folder, others, len(rows)))
    if guessed:
        pair = f"{{prompt: {_quoted(guessed[0])}, answer: {_quoted(guessed[1])}}}"
        told.add(f"  columns: {pair}", "guessed from names and lengths: look whether it is right")
    if not info.encoding.startswith("utf-8"):
        told.add(f"  encoding: {info.encoding}", "as found; the file is not UTF-8")
    if dataset.skipped:
        told.add("  on_bad: skip", f"{dataset.skipped} rows are bad, such as {_line(str(dataset.faults[0]))}")
    tags = _tags(file, dataset, guessed)
    if tags:
        told.add(
            f"  # tags: [{', '.join(map(_quoted, tags))}]", "columns with few values: the report can be sliced by them"
        )
    told.add(*_template(model, rows))
    told.add("method: {name: lora, rank: 16}", "16 is enough for most tasks of 100 to 5,000 rows")
    told.add("train:")
    told.add(
        f"  epochs: {_epochs(len(rows))}", f"for {len(rows):,} rows; stops by itself where the dev loss does not fall"
    )
    told.add("evaluate:")
    told.add(f"  primary: {task.primary}", task.why)
    told.add(f"  also: [{', '.join(task.also)}]")
    if _judged(others, len(rows)) > MANY_TEST:
        told.add(
            f"  limit: {LIMIT}",
            "answering is slow on a CPU: so many rows, chosen once; raise it for a narrower interval",
        )
    return told.lines


def _held_out(side: str, folder: Path, others: Mapping[str, Path], rows: int) -> tuple[str, str]:
    if side in others:
        return f"  {side}: {_quoted(os.path.relpath(others[side], folder))}", "found beside the training file"
    share = min(0.3, max(0.15, round(WANTED_TEST / rows, 2))) if side == "test" else 0.15
    count = int(share * rows)
    if side == "dev":
        return f"  dev: {share}", f"about {count} rows steer training; rows that are nearly the same stay on one side"
    few = "" if count >= WANTED_TEST else f"; {WANTED_TEST} or more would give a narrower interval"
    return f"  test: {share}", f"about {count} rows are judged once, at the end{few}"


def _judged(others: Mapping[str, Path], rows: int) -> int:
    """About how many test rows there will be."""
    if "test" not in others:
        return int(0.15 * rows)
    with others["test"].open("rb") as file:
        return sum(1 for _ in file)


def _model(model: str | None, rows: Sequence[Example]) -> tuple[str, str]:
    if model:
        return _quoted(model), "as you said"
    written = script("".join(f"{row.question[:200]}{row.answer[:200]}" for row in rows[:LOOKED_AT]))
    if written in ("han", "kana"):
        return EAST_ASIAN_MODEL, f"the rows are in {written} script, which the smaller default does not know"
    return DEFAULT_MODEL, "small enough for two CPU cores; `luthier models list` has others"


def _template(model: str | None, rows: Sequence[Example]) -> tuple[str, str]:
    inside = profile.templates_inside(rows)
    most = max(inside, key=lambda name: len(inside[name]), default="")
    if most and len(inside[most]) > len(rows) / 2:
        return "template: raw", f"the rows bring their own ({most}); nothing is added but the end token"
    entry = next((entry for entry in catalog.entries() if entry.name == model), None)
    if entry and not entry.chat:
        return "template: plain", f"{model} has no chat template"
    return "template: chat", "the model's own chat format"


def _tags(file: Path, dataset: Dataset, guessed: tuple[str, str] | None) -> list[str]:
    """Columns that play no part and have few values."""
    unused = dataset.files[0].unused
    parsing = Parsing(columns={"prompt": guessed[0], "answer": guessed[1]} if guessed else None)
    rows = [row.value for row in islice(File(file, parsing).rows(), LOOKED_AT) if isinstance(row, Row)]
    values = {name: {str(row.get(name)) for row in rows} for name in unused}
    return [name for name, seen in values.items() if len(seen) in TAGS and len(seen) < len(rows) / 2][:3]


def _epochs(rows: int) -> int:
    return 5 if rows < 300 else 3 if rows < 2000 else 2 if rows < 10_000 else 1


def _name(folder: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._")[:64] or "task"


def _line(text: str) -> str:
    """One line without control characters, for a comment."""
    return "".join(character if character.isprintable() else " " for character in text)[:120]


def _quoted(text: str) -> str:
    """A YAML scalar: plain where that is safe, else in quotes."""
    return text if re.fullmatch(r"[A-Za-z_./][\w./-]*", text) else json.dumps(text, ensure_ascii=False)


def _is_record(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
