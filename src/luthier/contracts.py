"""Every extension point on one page. A plug-in is one class in one file on its shelf; the file name is its name.

Shelf files must be importable without torch: torch, transformers and peft are imported inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from luthier.errors import Fault
from luthier.records import Completion, Example, Loss, Message, Rendered, Row, Score

if TYPE_CHECKING:
    import torch


class Options(BaseModel):
    """Options of a plug-in: declared once here; the field's description is the help and the schema's text."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Plugin(ABC):
    """Anything that a user names in YAML. `name` is filled in by the registry from the file's name."""

    name: ClassVar[str] = ""
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()


class Source(Plugin):
    """A kind of file that rows are read from."""

    suffixes: ClassVar[tuple[str, ...]] = ()  # lower case, without .gz

    @abstractmethod
    def rows(self, path: Path, *, encoding: str | None = None, start: int = 0) -> Iterator[Row | Fault]:
        """Yield rows in file order, or a Fault for a record that cannot be read; `start` is a Row's cursor."""


class TextTools(Protocol):
    """What a template may ask of a tokenizer."""

    chat_template: str | None
    bos: str
    start: str  # what the tokenizer puts before every text by itself: BOS or nothing
    eos: str
    ends: tuple[str, ...]  # texts of the tokens that end a turn, most usual first


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the rendered text. Pieces are tokenised apart, so a prompt is always a prefix of its row."""

    text: str
    message: int | None = None  # index of the assistant message whose answer this is, else None


class Template(Plugin):
    """How messages become text. The concatenated pieces are the whole text; BOS, if any, is written out."""

    @abstractmethod
    def pieces(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render a conversation that ends in an answer. An answer's piece ends with its end token."""

    @abstractmethod
    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: TextTools) -> list[Piece]:
        """Render the turns before an answer, up to the point where the model speaks."""

    def source(self, text: TextTools) -> str:
        """The template's own text, for hashing and for the adapter folder."""
        return self.name


class Adapted(ABC):
    """A base model with one adapter on it, as `Method.attach` leaves it."""

    model: Any  # the transformers model whose forward runs with the adapter

    @abstractmethod
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by a name that is stable across processes."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the model is the bare base."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the adapter's files (safetensors and JSON only) into an existing folder."""

    @abstractmethod
    def merge(self) -> Any:
        """Fold the adapter into the base for good and return the plain model."""

    @abstractmethod
    def detach(self) -> Any:
        """Take the adapter off and return the plain base, unchanged bit for bit."""

    def saved_bytes(self) -> int:
        """How large the saved tensors are; known on the meta device too."""
        return sum(4 * parameter.numel() for parameter in self.trainable().values())

    def penalty(self) -> torch.Tensor | None:
        """A scalar that the mean loss of every optimiser step is increased by, with autograd; None: nothing."""
        return None

    def stepped(self, done: int, total: int, gradients: Mapping[str, torch.Tensor]) -> Sequence[str]:
        """Hear that optimiser step `done` of `total` is taken, with its mean gradients, before they are cleared.

        Returns the names of trainable parameters whose values it changed, for the float32 master to be read anew.
        """
        return ()

    def state(self) -> dict[str, torch.Tensor]:
        """What must outlive a kill beside the trainable values, as CPU tensors; shapes never change."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put a `state()` back."""
        return


class Evidence(Protocol):
    """The run as a method may look at it before training: for Fisher masks, data-driven first values, schedules."""

    total_steps: int  # optimiser steps of the run

    def losses(self, count: int) -> Iterator[Loss]:
        """The losses of up to `count` training rows on the model as it stands now, row by row, with autograd."""


Family = Literal["additive", "selective", "reparametrised", "full"]


@dataclass(frozen=True)
class About:
    """What `luthier methods NAME` tells. Plain words for someone who knows LoRA by name only."""

    family: Family
    title: str  # "LoRA: a low-rank update beside every linear layer"
    trains: str  # what learns, as a short phrase for the table
    formula: str  # on one line, `W`, `x`, `h` as in the literature
    source: str  # "Hu et al. 2021, arXiv 2106.09685"
    sites: tuple[str, ...]  # where it sits in the drawing of a block: keys of `flows.methods.SITES`
    text: str  # what it does and when to take it, two to six sentences
    folklore: tuple[tuple[str, str], ...] = ()  # (what is said, what is true)


class Method(Plugin):
    """One way of tuning: what is added to, or freed in, a frozen base.

    Each of the values below may be a property where it depends on the options.
    """

    about: ClassVar[About]
    fresh: ClassVar[str] = "exact"  # a fresh adapter changes no logit: exact | tolerance | changes: <reason>
    not_merged: ClassVar[str] = ""  # why the adapter cannot be folded into its base; empty where it can
    learning_rate: ClassVar[float] = 1e-3  # peak, where the task names none (methods reference, section 1)
    bracket: ClassVar[tuple[float, float]] = (1e-4, 1e-2)  # where a search for the learning rate begins

    @abstractmethod
    def attach(self, model: Any, *, seed: int, evidence: Evidence | None = None) -> Adapted:
        """Put a fresh adapter on the model, freeze the base, and draw initial values from `seed`.

        A method that needs evidence raises TrainingError without it, except on the meta device, where only shapes
        matter. SpecError where the model has nothing that the method could train.
        """

    def load(self, model: Any, folder: Path) -> Adapted:
        """Put a saved adapter on the model. Missing, extra or misshapen tensors are an error."""
        from luthier.adapt import wrapped

        return wrapped.load(model, folder)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Optimiser settings by parameter name: {'lr_scale': 1.0, 'weight_decay': 0.0}; absent means default."""
        return {}


class Objective(Plugin):
    """What is asked of the model: a sum over targets and the count that it is divided by."""

    def branches(self, example: Example, render: Any) -> list[Rendered]:
        """The rows that one example contributes (SFT: one; preferences: chosen and rejected)."""
        return [render(example)]

    @abstractmethod
    def loss(self, logprobs: torch.Tensor, batch: Any) -> Loss:
        """Loss of one pack. `logprobs` (targets,) float32: log p(target); `batch` carries weights and rows."""


class Scorer(Plugin):
    """A metric is a reward is a filter: it judges one answer, and aggregates only from its items."""

    higher_is_better: ClassVar[bool] = True
    binary: ClassVar[bool] = False  # values are 0 or 1: exact paired tests apply

    @abstractmethod
    def score(self, answer: str, gold: str, example: Example | None = None) -> Score:
        """Score one answer. `score(gold, gold)` must be 1 (the self-check at load)."""

    def aggregate(self, scores: Sequence[Score]) -> float | None:
        """Mean of the scored items; corpus metrics override it and use `parts`."""
        values = [score.value for score in scores if score.value is not None]
        return sum(values) / len(values) if values else None


class Backend(Plugin):
    """Something that answers prompts: a local model, an endpoint, a file of replies."""

    @abstractmethod
    def complete(
        self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Completion]:
        """Answer the prompts in order."""
