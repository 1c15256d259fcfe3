"""Guesses of the next tokens by looking a row's last tokens up in its prompt, its answer and earlier answers.

Answers that copy from the prompt (extraction) or repeat each other (JSON of one schema) are guessed well. Guesses are
checked by the model in one pass, so greedy answers stay exactly what they were; they pay while a pass costs mostly the
reading of weights, in small batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

GRAMS = (4, 3, 2)  # lengths that are looked up, the surest first
MOST = 8  # tokens guessed at once
LEAD = max(GRAMS)  # tokens of a prompt's end that an earlier answer is remembered with
WIDTHS = (0, 1, 2, 3, 4, 6, MOST)


@dataclass
class Grams:
    """A growing text and where each of its n-grams ended last."""

    text: list[int] = field(default_factory=list)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)
    _seen: int = 0  # tokens whose n-grams are noted; the last token's are not, as nothing follows it yet

    def extend(self, tokens: Sequence[int], *, apart: bool = False) -> None:
        """Put tokens behind the text; `apart`: they begin anew, and no n-gram reaches back over the seam."""
        first = len(self.text) if apart else max(0, self._seen)
        self.text.extend(tokens)
        for end in range(max(first, self._seen) + 1, len(self.text)):
            for size in GRAMS:
                if end - size >= (first if apart else 0):
                    self._after[tuple(self.text[end - size : end])] = end
        self._seen = max(0, len(self.text) - 1)

    def after(self, gram: tuple[int, ...], most: int) -> list[int]:
        """Up to `most` tokens that followed this n-gram the last time."""
        end = self._after.get(gram)
        return self.text[end : end + most] if end is not None else []


def guess(recent: Sequence[int], places: Sequence[Grams], most: int = MOST) -> list[int]:
    """Tokens that followed the longest known n-gram at the end of `recent`, from the first place that knows it."""
    for size in GRAMS:
        gram = tuple(recent[-size:])
        if len(gram) == size:
            for place in places:
                if found := place.after(gram, most):
                    return found
    return []


@dataclass
class Pace:
    """How many guessed tokens a pass should check, from how many were right so far.

    A pass over n tokens takes as long as WEIGHTS + n tokens' arithmetic. A right guess saves its row's share of a pass.
    """

    WEIGHTS = 18  # measured: SmolLM2-135M in float32 with AVX2, one token 23 ms, 64 tokens 132 ms (ten layers)
    PATIENCE = 32  # passes without a guess after which one token is tried again

    right: float = 4.0  # decayed counts; the first ones are an assumption
    offered: float = 8.0
    idle: int = 0

    def width(self, rows: int, lengths: Sequence[int]) -> int:
        """Tokens to check beside each row's own, where `lengths` are the guesses there are; 0: none pay."""
        if not any(lengths):
            return 0
        chance = self.right / self.offered
        best = max(WIDTHS, key=lambda width: self._speed(chance, rows, lengths, width))
        self.idle = 0 if best else self.idle + 1
        return best or int(self.idle % self.PATIENCE == 0)

    def _speed(self, chance: float, rows: int, lengths: Sequence[int], width: int) -> float:
        expected = rows + sum(sum(chance**n for n in range(1, min(width, each) + 1)) for each in lengths)
        return expected / (self.WEIGHTS + rows * (1 + min(width, max(lengths))))

    def saw(self, right: int, offered: int) -> None:
        """Count a row's guesses: each right one, and the first wrong one if there was one."""
        tried = min(offered, right + 1)
        self.right = 0.97 * self.right + right
        self.offered = 0.97 * self.offered + tried
