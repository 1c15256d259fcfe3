"""A task's rows on their sides, and what they will be rendered with: what `prepare` and `check` both begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from luthier import registry, store
from luthier.contracts import Template
from luthier.data.read import Dataset, FileInfo, bad_rows, read
from luthier.data.split import Split, split
from luthier.data.stream import Stream
from luthier.errors import DataError, Fault
from luthier.flows.events import Listener, Stage, silent
from luthier.model import catalog
from luthier.records import Example
from luthier.spec import DataSpec, RunSpec
from luthier.text.tokenizer import Tokenizer

SAMPLED = 500  # rows of a stream that are looked at before training
SHARED_LAYERS = {"full_attention", "sliding_attention"}  # kinds of layer that prefix trees are exact for


@dataclass(frozen=True)
class Gathered:
    """A task's rows on their sides, and what they will be rendered with. Nothing has been judged or left out yet."""

    spec: RunSpec
    template: Template
    tokenizer: Tokenizer
    model_folder: Path
    context: int | None
    separate: str
    datasets: Mapping[str, Dataset]
    sides: Split
    stream: Stream | None

    @property
    def files(self) -> list[FileInfo]:
        return [info for dataset in self.datasets.values() for info in dataset.files]

    @property
    def bad(self) -> list[Fault]:
        return [fault for dataset in self.datasets.values() for fault in dataset.faults]

    @property
    def examples(self) -> list[Example]:
        return [*self.sides.train, *self.sides.dev, *self.sides.test]


def gather(
    spec: RunSpec, *, split_history: Mapping[str, str] | None = None, on_event: Listener | None = None
) -> Gathered:
    """Find the model, read the rows and split them; raise SpecError or DataError with every fault at once."""
    tell = on_event or silent
    template: Template = registry.make("templates", spec.template, "template")
    folder = catalog.locate(
        spec.model.name, revision=spec.model.revision, progress=lambda text: tell(Stage("fetch the model", text))
    )
    config = text_config(folder)
    tell(Stage("read the rows", ", ".join(Path(path).name for path in spec.data.train)))
    datasets = read_rows(spec.data)
    stream = open_stream(spec.data) if spec.data.stream else None
    sample = _first_rows(spec.data) if stream else []
    return Gathered(
        spec=spec,
        template=template,
        tokenizer=Tokenizer.from_folder(folder),
        model_folder=folder,
        context=config.get("max_position_embeddings"),
        separate=cannot_share(config),
        datasets=datasets,
        sides=sides_of(spec.data, datasets, split_history, sample),
        stream=stream,
    )


def _first_rows(data: DataSpec) -> list[Example]:
    """The first rows of a stream, at most one pass of it (a stream itself never ends)."""
    stream, rows = open_stream(data, buffer=1), list[Example]()
    for example in islice(stream, SAMPLED):
        if stream.epoch > 0:
            break
        rows.append(example)
    return rows


def read_rows(data: DataSpec) -> dict[str, Dataset]:
    """Read the files of each side that names files; raise one DataError with the faults of all of them."""
    wanted: dict[str, Sequence[str]] = {} if data.stream else {"train": data.train}
    wanted |= {side: value for side in ("dev", "test") if isinstance(value := getattr(data, side), list)}
    rows, faults, can_skip = {}, list[Fault](), True
    for side, paths in wanted.items():
        try:
            rows[side] = read(paths, **_parsing(data))
        except DataError as error:
            faults += error.faults or [Fault(error.where, error.what, error.remedy)]
            can_skip = can_skip and "on_bad" in error.remedy
    if faults:
        raise bad_rows(faults, can_skip=can_skip)
    return rows


def open_stream(data: DataSpec, *, buffer: int | None = None) -> Stream:
    """The training files as a stream from their beginning."""
    return Stream(data.train, **_parsing(data), buffer=buffer or data.shuffle_buffer, seed=data.seed)


def sides_of(
    data: DataSpec, rows: Mapping[str, Dataset], history: Mapping[str, str] | None, sample: Sequence[Example] = ()
) -> Split:
    """Split what is to be split, and put the rows of dev and test files on their sides."""
    files = {side: rows[side].examples for side in ("dev", "test") if side in rows}
    if "train" not in rows:
        return Split(list(sample), files["dev"], files["test"])
    shares = {side: 0.0 if side in files else float(getattr(data, side)) for side in ("dev", "test")}
    parted = split(rows["train"].examples, **shares, seed=data.seed, previous=history)
    return Split(
        parted.train,
        files.get("dev", parted.dev),
        files.get("test", parted.test),
        parted.quarantined,
        parted.clusters,
    )


def _parsing(data: DataSpec) -> dict[str, Any]:
    """How rows are read, as keywords of `read` and `Stream`."""
    names = ("format", "columns", "tags", "system", "encoding", "on_bad")
    return {name: getattr(data, name) for name in names}


def text_config(folder: Path) -> dict[str, Any]:
    """A model's `config.json`, the text part of it where the model has several."""
    config: dict[str, Any] = store.read_json(folder / "config.json")
    return dict(config.get("text_config", config))


def cannot_share(config: Mapping[str, Any]) -> str:
    """Why prefix trees are not exact for an architecture, as far as its configuration tells; empty if they are."""
    kind = config.get("model_type", "this model")
    foreign = sorted(set(config.get("layer_types") or ()) - SHARED_LAYERS)
    if foreign:
        return f"{kind} has layers other than attention ({', '.join(foreign)})"
    if config.get("attn_logit_softcapping") is not None:
        return f"{kind} caps its attention logits"
    return ""
