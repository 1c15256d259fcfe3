"""The nouns that cross rooms. No torch here: tensors appear as `Any`, arrays are numpy's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from: a file and its 1-based line (or row, in formats without lines)."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record of a source. `cursor` is where the *next* row starts, in the source's own unit."""

    value: Mapping[str, Any]
    origin: Origin
    cursor: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` is None for the default (answers 1, all else 0) or the row's own wish."""

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # tool_calls, name, tool_call_id ...

    def as_dict(self) -> dict[str, Any]:
        """The shape chat templates expect."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation that ends in the wanted answer.

    `lineage` holds the ids of the rows it was made from (its own id when it was collected). `tags` are the user's
    columns, for slices. `tools` are function schemas for templates that show them.
    """

    messages: tuple[Message, ...]
    origin: Origin
    rejected: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()

    @cached_property
    def id(self) -> str:
        """Content hash: equal content has an equal id wherever it stands."""
        content = [[m.as_dict(), m.weight] for m in self.messages], [m.as_dict() for m in self.rejected or ()]
        text = json.dumps([content, list(self.tools)], sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def lineage(self) -> tuple[str, ...]:
        return self.roots or (self.id,)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last turn's text: the answer that is trained and judged."""
        return self.messages[-1].content

    @property
    def question(self) -> str:
        """What tells this row from its neighbours: every turn of the prompt but the system's."""
        return "\n".join(m.content for m in self.prompt if m.role != "system")


@dataclass(frozen=True)
class Rendered:
    """An example as the model sees it. `weights[i]` is the loss weight of *predicting* `ids[i]`; equal lengths.

    `ids[:prompt_length]` is the prompt that generation starts from: always a prefix of the training text.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    prompt_length: int
    example_id: str = ""
    cut: int = 0  # tokens removed by an allowed truncation

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.weights), "ids and weights are born together"

    @property
    def supervised(self) -> int:
        """How many tokens carry a loss."""
        return sum(1 for weight in self.weights if weight)


@dataclass(frozen=True)
class Pack:
    """A prefix tree of several rendered rows, laid out depth first in one row of tokens.

    Segment s covers tokens [starts[s], starts[s+1]) and hangs below `parents[s]` (-1: a root). A token attends to its
    ancestors' segments and to the tokens before it in its own. Because of the depth-first order the descendants of s
    are the tokens [starts[s+1], ends[s]). Targets are kept apart from tokens since a branch point predicts one token
    per branch.
    """

    ids: IntArray  # (tokens,)
    positions: IntArray  # (tokens,) depth of each token in its row
    starts: IntArray  # (segments + 1,)
    parents: IntArray  # (segments,)
    ends: IntArray  # (segments,) one past the last token of the segment's subtree
    target_source: IntArray  # (targets,) the token whose state predicts
    target_ids: IntArray  # (targets,) what it should predict
    target_weights: FloatArray  # (targets,)
    target_row: IntArray  # (targets,) which of the packed rows it belongs to
    rows: tuple[str, ...]  # (rows,) example ids, in the order of `target_row`
    plain_tokens: int  # tokens that separate rows would have cost

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Loss:
    """A sum and the count it will be divided by, once, over a whole optimiser step."""

    sum: Any  # scalar tensor
    count: float


@dataclass(frozen=True)
class Step:
    """What one optimiser step did. Times in seconds, memory in bytes; `loss` per supervised weight."""

    index: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int  # computed, after sharing
    plain_tokens: int  # what separate rows would have cost
    supervised: float
    examples: int
    seconds: float
    memory: int
    dev_loss: float | None = None


@dataclass(frozen=True)
class Completion:
    """A generated answer. `stop` is `end` (the model ended), `length` (the limit cut it) or `text` (a stop string)."""

    text: str
    ids: tuple[int, ...] = ()
    stop: str = "end"
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Score:
    """One item's value in [0, 1] (or a metric's own range); None means UNSCORED, with the reason."""

    value: float | None
    reason: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """One system's answer to one item, with everything needed to score it again later."""

    example_id: str
    question: str
    gold: str
    text: str
    stop: str
    origin: str
    lineage: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter folder says about itself (`luthier.json`), beside PEFT's own two files."""

    name: str
    base: str
    base_hash: str
    method: Mapping[str, Any]
    template: Mapping[str, Any]
    template_hash: str
    tokenizer_hash: str
    data_hash: str
    dtype: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # name -> sha256
    version: str = "1"
    quantize: Mapping[str, Any] = field(default_factory=dict)  # how the base's matrices were kept; empty: plain
