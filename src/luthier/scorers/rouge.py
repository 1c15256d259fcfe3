"""ROUGE-L through `rouge_score`, with words of any script (its own tokeniser knows Latin letters only)."""

from __future__ import annotations

from functools import cache
from typing import Any

from luthier import contracts
from luthier.records import Example, Score
from luthier.text.words import words


class Rouge(contracts.Scorer):
    """F-measure of the longest common subsequence; ROUGE-1 and ROUGE-2 stand in the parts."""

    def score(self, answer: str, gold: str, example: Example | None = None) -> Score:
        """Compare one answer with its gold. ROUGE-2 is None where the gold has a single word."""
        told, wanted = words(answer), words(gold)
        if not told or not wanted:
            return Score(float(told == wanted))
        found = _scorer().score(gold, answer)
        parts = {name: found[name].fmeasure for name in ("rouge1", "rouge2")}
        if len(wanted) < 2:
            parts["rouge2"] = None
        return Score(found["rougeL"].fmeasure, parts=parts)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())
