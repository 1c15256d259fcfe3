"""Many rows answered together: what prompts share is computed once, and waiting rows take the places of finished ones.

Rows enter in groups, so that their prompts run in large products, and the batch stays full until no row waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.model import decode, lookup, stems
from luthier.model.draw import Draws, Sampling, choose
from luthier.model.logprob import head_logits

Event = tuple[int, int, float]  # row, token, its log-probability

FILL_TOKENS = 4096  # of prompts in one pass: bounds the memory of activations; products gain nothing beyond
WASTE_TOKENS = 128  # of padding in one pass of prompts; more than that costs more than another pass does
ENTER_SHARE = 0.25  # of the batch that must be free before waiting rows enter together


@dataclass
class Row:
    """A row that is being answered."""

    index: int
    draws: Draws | None
    grams: lookup.Grams | None  # its prompt and answer, where guessing is on
    stem: int
    answer: list[int] = field(default_factory=list)
    guess: lookup.Guess = field(default_factory=lookup.Guess)  # tokens behind the last one that the next pass checks


class Batch:
    """The rows in work, their memory, and those that wait."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        stop_ids: Set[int],
        limit: int,
        capacity: int,
        sampling: Sampling,
        guesses: bool,
    ) -> None:
        """`limit` tokens a row at most, `capacity` rows at a time; `guesses` only where nothing is drawn."""
        self.model, self.prompts, self.stop_ids, self.limit = model, prompts, stop_ids, limit
        self.sampling, self.pace = sampling, lookup.Pace() if guesses else None
        self.earlier = lookup.Grams()  # answers of finished rows
        self.plan = stems.find(prompts)
        self.waiting = deque(self.plan.order)
        self.below = [0] * len(self.plan.stems)  # rows that are not finished, by stem
        for leaf in self.plan.leaf:
            self._count(leaf, 1)
        self.kept: dict[int, decode.Shared | None] = {}
        self.rows: list[Row] = []  # by slot
        room = max(len(self.own(row)) for row in range(len(prompts))) + limit + (lookup.MOST if guesses else 0)
        self.memory = decode.Memory(min(capacity, len(prompts)), room)

    def events(self) -> Iterator[Event]:
        """Yield every row's tokens as they are chosen."""
        states = self.enter()  # (rows, 1 + guessed, hidden)
        while self.rows:
            yield from self._decide(states)
            self._leave()
            states = self._step() if self.rows else None
            entered = self.enter()
            states = entered if states is None else joined(states, entered)

    def enter(self) -> torch.Tensor | None:
        """Let waiting rows in while there is room enough; their last tokens' states (rows, 1, hidden)."""
        found: list[torch.Tensor] = []
        while self.waiting and self.memory.capacity - len(self.rows) >= self._enough(bool(found)):
            found.append(self._fill(self._group()))
        return torch.cat(found)[:, None] if found else None

    def _enough(self, entering: bool) -> int:
        if entering or not self.rows:
            return 1
        return max(1, min(int(ENTER_SHARE * self.memory.capacity), len(self.waiting)))

    def _group(self) -> list[int]:
        """The next rows that run their prompts together: of like length, as many as there is room for."""
        free, group, tokens = self.memory.capacity - len(self.rows), list[int](), 0
        longest = 0
        while self.waiting and len(group) < free:
            own = len(self.own(self.waiting[0]))
            longest, tokens = max(longest, own), tokens + own
            padded = longest * (len(group) + 1)
            if group and (padded > FILL_TOKENS or padded - tokens > WASTE_TOKENS):
                break
            group.append(self.waiting.popleft())
        return group

    def _fill(self, group: Sequence[int]) -> torch.Tensor:
        """Run the prompts of a group; the states of their last tokens (rows, hidden)."""
        owns, first = [self.own(index) for index in group], len(self.rows)
        for index in group:
            leaf = self.plan.leaf[index]
            self.memory.add(self._stem(leaf))
            grams = None
            if self.pace:
                grams = lookup.Grams()
                grams.extend(self.prompts[index])
            self.rows.append(Row(index, self.sampling.draws(index), grams, leaf))
        ids = torch.zeros(len(group), max(map(len, owns)), dtype=torch.long)
        for place, own in enumerate(owns):
            ids[place, : len(own)] = torch.tensor(own)
        states = decode.forward(self.model, ids.to(self.model.device), self.memory, first=first)
        self.memory.lengths[first:] = [len(own) for own in owns]
        lengths = torch.tensor([len(own) for own in owns], device=states.device)
        return states[torch.arange(len(group), device=states.device), lengths - 1]

    def _decide(self, states: torch.Tensor | None) -> Iterator[Event]:
        """Choose each row's next tokens: one, and one more for every guess that was right."""
        assert states is not None, "there are rows"
        wide = [1 + len(row.guess.tokens) for row in self.rows]
        picked = states[:, 0] if max(wide) == 1 else torch.cat([s[:w] for s, w in zip(states, wide, strict=True)])
        chosen = zip(*choose(head_logits(self.model, picked), self.sampling, [r.draws for r in self.rows]), strict=True)
        for slot, row in enumerate(self.rows):
            found = [next(chosen) for _ in range(wide[slot])]
            taken = self._right(row, [token for token, _ in found])
            self.memory.lengths[slot] += taken - 1  # the last one's keys come with the next pass
            for token, logprob in found[:taken]:
                row.answer.append(token)
                yield row.index, token, logprob
            if row.grams:
                row.grams.extend(row.answer[-taken:])

    def _right(self, row: Row, tokens: Sequence[int]) -> int:
        """How many of the tokens follow from tokens that were chosen, up to an end."""
        taken = 1
        while taken < len(tokens) and tokens[taken - 1] == row.guess.tokens[taken - 1]:
            if tokens[taken - 1] in self.stop_ids:
                break
            taken += 1
        if self.pace and row.guess.tokens:
            self.pace.saw(row.guess, taken - 1)
        return taken

    def _leave(self) -> None:
        """Take finished rows out."""
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if len(row.answer) < self.limit and row.answer[-1] not in self.stop_ids:
                continue
            if self.pace:
                self.earlier.extend([*self.prompts[row.index][-lookup.LEAD :], *row.answer], apart=True)
            self.finish(slot)

    def finish(self, slot: int) -> None:
        """Take a row out; the last slot's row moves into the gap, as in the memory."""
        self._count(self.rows[slot].stem, -1)
        self.memory.drop(slot)
        self.rows[slot] = self.rows[-1]
        self.rows.pop()

    def _step(self) -> torch.Tensor:
        """Run each row's last token and its guesses; states (rows, 1 + most guesses, hidden)."""
        self._guess()
        wide = max(len(row.guess.tokens) for row in self.rows)
        ids = torch.tensor(
            [[row.answer[-1], *row.guess.tokens, *[0] * (wide - len(row.guess.tokens))] for row in self.rows],
            device=self.model.device,
        )
        states = decode.forward(self.model, ids, self.memory)
        self.memory.lengths = [length + 1 for length in self.memory.lengths]
        return states

    def _guess(self) -> None:
        if self.pace is None:
            return
        for row in self.rows:
            assert row.grams is not None, "made with the row"
            most = min(lookup.MOST, self.limit - len(row.answer) - 1)
            recent = row.grams.text[-lookup.LEAD :]
            row.guess = lookup.guess(recent, (self.earlier, row.grams), most) if most > 0 else lookup.Guess()
        width = self.pace.width([row.guess for row in self.rows])
        for row in self.rows:
            row.guess = row.guess.cut(width)

    def own(self, index: int) -> Sequence[int]:
        """A prompt's tokens behind its stem."""
        leaf = self.plan.leaf[index]
        return self.prompts[index][self.plan.stems[leaf].end if leaf >= 0 else 0 :]

    def _stem(self, number: int) -> decode.Shared | None:
        """A stem's keys and values, computed when the first row needs them; -1: what stands before all rows."""
        if number not in self.kept:
            ids: Sequence[int] = ()
            above = None
            if number >= 0:
                stem = self.plan.stems[number]
                ids = self.prompts[stem.row][stem.begin : stem.end]
                above = self._stem(stem.parent) if stem.parent >= 0 else None
            self.kept[number] = decode.begin_with(self.model, ids, above)
        return self.kept[number]

    def _count(self, number: int, change: int) -> None:
        """Count rows below a stem and those above it; forget keys and values that nobody needs any more."""
        while number >= 0:
            self.below[number] += change
            if self.below[number] == 0:
                self.kept.pop(number, None)
            number = self.plan.stems[number].parent


def joined(states: torch.Tensor, entered: torch.Tensor | None) -> torch.Tensor:
    """States of rows in work and of those that came in, which have no guesses yet."""
    if entered is None:
        return states
    return torch.cat([states, torch.nn.functional.pad(entered, (0, 0, 0, states.shape[1] - 1))])
