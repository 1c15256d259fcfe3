"""chrF through sacrebleu: character n-grams, so it needs no tokeniser and serves every script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.records import Example, Score


class Options(contracts.Options):
    """Which n-grams count."""

    word_order: int = Field(0, ge=0, le=2, description="word n-grams counted beside characters; 2 is chrF++")
    lowercase: bool = Field(False, description="ignore case")


class Chrf(contracts.Scorer):
    """F-score (beta 2) of character n-grams up to 6, in [0, 1] (Popovic 2015)."""

    Options = Options

    def score(self, answer: str, gold: str, example: Example | None = None) -> Score:
        """Score one sentence; its n-gram counts stand in `parts.stats`, for the corpus value."""
        metric = self._metric()
        # sacrebleu publishes no sufficient statistics; its own significance module reads this same method.
        stats = [int(count) for count in metric._extract_corpus_statistics([answer], [[gold]])[0]]
        value = self._value(stats) if any(stats) else float(answer.strip() == gold.strip())
        return Score(value, parts={"stats": stats})

    def aggregate(self, scores: Sequence[Score]) -> float | None:
        """Corpus chrF: sum the counts, then compute once."""
        stats = [score.parts["stats"] for score in scores if score.value is not None]
        return self._value([sum(column) for column in zip(*stats, strict=True)]) if stats else None

    def signature(self) -> str:
        """What must be quoted with a chrF value (sacrebleu's own form)."""
        metric = self._metric()
        metric.sentence_score("a", ["a"])  # the signature is complete once something was scored
        return str(metric.get_signature())

    def _value(self, stats: Sequence[int]) -> float:
        """F-score of [answer, gold, matching] counts for each order."""
        if not any(stats):
            return 1.0  # nothing was wanted and nothing was said
        return min(1.0, float(self._metric()._compute_f_score(list(stats))) / 100)

    def _metric(self) -> Any:
        return _metric(self.options.word_order, self.options.lowercase)


@cache
def _metric(word_order: int, lowercase: bool) -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(word_order=word_order, lowercase=lowercase)
