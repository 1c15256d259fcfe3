"""Token F1: how many words answer and gold share; scripts without spaces count by character."""

from __future__ import annotations

from collections import Counter

from luthier import contracts
from luthier.records import Example, Score
from luthier.text.words import words


class F1(contracts.Scorer):
    """Harmonic mean of word precision and recall (as for SQuAD, without dropping articles)."""

    def score(self, answer: str, gold: str, example: Example | None = None) -> Score:
        """Compare the bags of words of one answer and its gold."""
        told, wanted = Counter(words(answer)), Counter(words(gold))
        if not told or not wanted:
            return Score(float(told == wanted), parts={"precision": 0.0, "recall": 0.0} if told != wanted else {})
        shared = (told & wanted).total()
        precision, recall = shared / told.total(), shared / wanted.total()
        value = 2 * precision * recall / (precision + recall) if shared else 0.0
        return Score(value, parts={"precision": precision, "recall": recall})
