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


@dataclass(frozen=True)
class Guess:
    """Tokens that may come next, and how many tokens before them were found elsewhere."""

    tokens: list[int] = field(default_factory=list)
    size: int = 0

    def cut(self, most: int) -> Guess:
        """The first `most` tokens."""
        return Guess(self.tokens[:most], self.size)


def guess(recent: Sequence[int], places: Sequence[Grams], most: int = MOST) -> Guess:
    """What followed the longest known n-gram at the end of `recent`, from the first place that knows it."""
    for size in GRAMS:
        gram = tuple(recent[-size:])
        if len(gram) == size:
            for place in places:
                if found := place.after(gram, most):
                    return Guess(found, size)
    return Guess()


@dataclass
class Pace:
    """How many guessed tokens a pass should check, from how many were right so far.

    A pass over n tokens takes as long as WEIGHTS + n tokens' arithmetic, one over a single token as long as ALONE.
    """

    # Measured with SmolLM2-135M in float32 (AVX2, one core): 65 ms for 1 token, 136 for 3, 160 for 16, 251 for 40, 375
    # for 64. A product with a vector reads the weights once; one with a matrix lays them out anew first.
    ALONE, WEIGHTS = 16, 30
    PATIENCE = 32  # passes without a guess after which one token is tried again

    # By the size of what was found: decayed counts of right tokens and of those tried. The first are an assumption.
    seen: dict[int, tuple[float, float]] = field(default_factory=lambda: dict.fromkeys(GRAMS, (5.0, 8.0)))
    idle: int = 0

    def width(self, guesses: Sequence[Guess]) -> int:
        """Tokens to check beside each row's own, where these are the rows' guesses; 0: none pay."""
        if not any(each.tokens for each in guesses):
            return 0
        best = max(WIDTHS, key=lambda width: self._speed(guesses, width))
        self.idle = 0 if best else self.idle + 1
        return best or int(self.idle % self.PATIENCE == 0)

    def _speed(self, guesses: Sequence[Guess], width: int) -> float:
        expected = float(len(guesses))
        for each in guesses:
            right, tried = self.seen[each.size] if each.tokens else (0.0, 1.0)
            expected += sum((right / tried) ** n for n in range(1, min(width, len(each.tokens)) + 1))
        tokens = len(guesses) * (1 + min(width, max(len(each.tokens) for each in guesses)))
        return expected / (self.ALONE if tokens == 1 else self.WEIGHTS + tokens)

    def saw(self, guess: Guess, right: int) -> None:
        """Count a row's guess: each right token, and the first wrong one if there was one."""
        before, tried = self.seen[guess.size]
        self.seen[guess.size] = (0.97 * before + right, 0.97 * tried + min(len(guess.tokens), right + 1))
