"""Answers out of a closed set: a trie of the labels' tokens behind each prompt.

`score` runs the whole trie behind each prompt in one pass and gives every label's log-probability. `choose` finds the
best label and its exact log-probability with fewer tokens: a label is at most as likely as its beginning, so one
that is less likely than a whole label need not be followed. Labels told apart by their first token cost one or
two tokens a prompt this way, whatever their number.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.errors import ModelError, UsageError
from luthier.model import decode
from luthier.model.attention import shares_prefixes
from luthier.model.draw import Sampling
from luthier.model.logprob import head_logits
from luthier.model.refill import FILL_TOKENS, Batch, joined

HEAD_ROWS = 512  # states per head product, as in `logprob`
PASS_TOKENS = 32  # a search looks at several beginnings at once while a pass over fewer tokens would take as long


@dataclass
class Node:
    """A beginning of labels. `number` counts the nodes that go on; -1: no label goes on here."""

    depth: int = 0  # its last token's place behind the prompt; 0 is the prompt itself
    token: int = -1
    parent: Node | None = None
    children: dict[int, Node] = field(default_factory=dict)
    label: int | None = None
    number: int = -1

    def path(self) -> Iterator[Node]:
        """This node and those above it, the prompt's left out."""
        node: Node | None = self
        while node is not None and node.parent is not None:
            yield node
            node = node.parent


@dataclass
class Trie:
    """Labels by their tokens."""

    root: Node
    inner: list[Node]  # nodes below the root at which labels go on, parents first: these are run

    @classmethod
    def of(cls, choices: Sequence[Sequence[int]]) -> Trie:
        """Join labels at what they begin with. UsageError for none, for an empty one and for one given twice."""
        root = Node()
        for label, tokens in enumerate(choices):
            node = root
            for token in tokens:
                node = node.children.setdefault(token, Node(node.depth + 1, token, node))
            if node is root or node.label is not None:
                what = "is empty" if node is root else f"is the same as choice {node.label}"
                raise UsageError(f"choice {label} {what}", where="choices", remedy="give each label once")
            node.label = label
        if not choices:
            raise UsageError("there is nothing to choose from", where="choices", remedy="give at least one label")
        inner, todo = list[Node](), [root]
        for node in todo:
            todo.extend(node.children.values())
            if node is not root and node.children:
                node.number = len(inner)
                inner.append(node)
        return cls(root, inner)

    def ancestry(self) -> torch.Tensor:
        """Boolean (inner, inner): [n, a], a is n or above it."""
        table = torch.zeros(len(self.inner), len(self.inner), dtype=torch.bool)
        for node in self.inner:
            table[node.number, [above.number for above in node.path()]] = True
        return table


def score(
    model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], *, batch_size: int = 32
) -> torch.Tensor:
    """Log-probability of every choice behind every prompt, float32 (prompts, choices).

    A choice is its token ids, the end token included if the answer is to end there. UsageError for unusable choices,
    ModelError where the model's attention cannot be exchanged.
    """
    trie = Trie.of(choices)
    scores = torch.zeros(len(prompts), len(choices))
    if not prompts:
        return scores
    rows = max(1, min(batch_size, FILL_TOKENS // max(1, len(trie.inner))))
    batch, ancestry = _batch(model, prompts, rows, len(trie.inner)), trie.ancestry()
    with torch.inference_mode():
        while (begun := batch.enter()) is not None:
            states = begun
            if trie.inner:
                states = torch.cat([begun, _whole(batch, trie, ancestry)], 1)  # (rows, 1 + inner, hidden)
            for slot, row in enumerate(batch.rows):
                scores[row.index] = _collect(model, states[slot], trie, len(choices))
            for slot in reversed(range(len(batch.rows))):
                batch.finish(slot)
    return scores


def choose(
    model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], *, batch_size: int = 32
) -> list[tuple[int, float]]:
    """The most likely choice of each prompt and its log-probability, by best-first search; see `score`."""
    trie = Trie.of(choices)
    if not prompts:
        return []
    batch = _batch(model, prompts, batch_size, len(trie.inner) + PASS_TOKENS)
    searches = [_Search(trie.root) for _ in prompts]
    with torch.inference_mode():
        states = batch.enter()
        while states is not None:
            _advance(batch, searches, _logprobs(model, states))
            run = _run(batch, searches) if batch.rows else None
            begun = batch.enter()
            states = begun if run is None else joined(run, begun)
    return [search.found for search in searches]


class _Search:
    """One prompt's search: beginnings by their log-probability, and where the run ones lie behind the prompt."""

    def __init__(self, root: Node) -> None:
        self.running = [(root, 0.0)]  # beginnings in the pass, with their log-probabilities
        self.found = (-1, float("-inf"))
        self.places: dict[int, int] = {}  # by the node's number
        self._open: list[tuple[float, int, Node]] = []
        self._count = itertools.count()

    def advance(self, logprobs: torch.Tensor, width: int) -> bool:
        """Take in what may follow the run beginnings, (nodes, vocabulary); True: the best is a whole label.

        Otherwise turn to the best `width` beginnings, none of which is less likely than a label that was found.
        """
        for (node, before), own in zip(self.running, logprobs, strict=False):
            children = list(node.children.values())
            for child, logprob in zip(children, own[[c.token for c in children]].tolist(), strict=True):
                heapq.heappush(self._open, (-(before + logprob), next(self._count), child))
        lost, _, best = self._open[0]
        if best.label is not None:
            self.found = (best.label, -lost)
            return True
        self.running = []
        while self._open and self._open[0][2].label is None and len(self.running) < width:
            lost, _, node = heapq.heappop(self._open)
            self.running.append((node, -lost))
        return False


def _advance(batch: Batch, searches: Sequence[_Search], logprobs: torch.Tensor) -> None:
    """Let every row's search go on; rows that have found their label leave."""
    width = max(1, PASS_TOKENS // len(batch.rows))
    done = [searches[row.index].advance(logprobs[slot], width) for slot, row in enumerate(batch.rows)]
    for slot in reversed(range(len(done))):
        if done[slot]:
            batch.finish(slot)


def _run(batch: Batch, searches: Sequence[_Search]) -> torch.Tensor:
    """Run the beginnings that each row's search has turned to; states (rows, most beginnings, hidden)."""
    memory, device = batch.memory, batch.model.device
    looking = [searches[row.index] for row in batch.rows]
    width = max(len(search.running) for search in looking)
    ids = torch.zeros(len(looking), width, dtype=torch.long)
    depths = torch.zeros_like(ids)
    sees = torch.zeros(len(looking), width, max(memory.lengths) + width, dtype=torch.bool)
    for row, search in enumerate(looking):
        prompt = len(batch.own(batch.rows[row].index))
        sees[row, :, :prompt] = True
        depths[row] = prompt  # of what fills the row up, too
        for place, (node, _) in enumerate(search.running):
            search.places[node.number] = memory.lengths[row] + place
            ids[row, place], depths[row, place] = node.token, prompt + node.depth - 1
            sees[row, place, [search.places[above.number] for above in node.path()]] = True
    states = decode.forward(
        batch.model, ids.to(device), memory, depths=depths.to(device), sees=sees.to(device)
    )  # fmt: skip
    memory.lengths = [n + len(search.running) for n, search in zip(memory.lengths, looking, strict=True)]
    return states


def _whole(batch: Batch, trie: Trie, ancestry: torch.Tensor) -> torch.Tensor:
    """Run the trie behind all prompts of the batch; states (rows, inner, hidden)."""
    device, lengths = batch.model.device, torch.tensor(batch.memory.lengths)
    inner = len(trie.inner)
    place = torch.arange(int(lengths.max()) + inner) - lengths[:, None]  # of each slot in the trie; before it: prompt
    within = (place >= 0) & (place < inner)
    sees = ancestry[:, place.clamp(0, inner - 1)].transpose(0, 1) & within[:, None] | (place < 0)[:, None]
    ids = torch.tensor([node.token for node in trie.inner]).expand(len(lengths), -1)
    depths = lengths[:, None] + torch.tensor([node.depth - 1 for node in trie.inner])
    return decode.forward(
        batch.model, ids.to(device), batch.memory, depths=depths.to(device), sees=sees.to(device)
    )  # fmt: skip


def _collect(model: Any, states: torch.Tensor, trie: Trie, count: int) -> torch.Tensor:
    """Every label's log-probability (labels,) from one prompt's states (1 + inner, hidden)."""
    steps = [(node, child) for node in (trie.root, *trie.inner) for child in node.children.values()]
    source = torch.tensor([node.number + 1 for node, _ in steps], device=states.device)
    tokens = torch.tensor([child.token for _, child in steps], device=states.device)
    own = torch.empty(len(steps))
    for first in range(0, len(states), HEAD_ROWS):
        logprobs = _logprobs(model, states[first : first + HEAD_ROWS])
        here = (source >= first) & (source < first + HEAD_ROWS)
        own[here.cpu()] = logprobs[source[here] - first, tokens[here]].cpu()
    sums, scores = {id(trie.root): 0.0}, torch.empty(count)
    for (node, child), logprob in zip(steps, own.tolist(), strict=True):
        sums[id(child)] = sums[id(node)] + logprob
        if child.label is not None:
            scores[child.label] = sums[id(child)]
    return scores


def _logprobs(model: Any, states: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(head_logits(model, states), -1)


def _batch(model: Any, prompts: Sequence[Sequence[int]], rows: int, inner: int) -> Batch:
    """Rows with room for the trie behind their prompts."""
    if reason := shares_prefixes(model):
        raise ModelError(f"cannot score choices behind a prompt: {reason}", remedy="score each label as an answer")
    return Batch(
        model, prompts, stop_ids=frozenset(), limit=max(1, inner), capacity=rows, sampling=Sampling(), guesses=False
    )  # fmt: skip
