"""BLEU through sacrebleu: a sentence value for each item, the corpus value from summed n-gram counts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from pydantic import Field

from luthier import contracts
from luthier.records import Example, Score
from luthier.text.words import script

_TOKENIZER = {"spaced": "13a", "han": "zh"}  # all other scripts without spaces: by character
_ORDER = 4


class Options(contracts.Options):
    """How sentences are cut into words."""

    tokenize: Literal["auto", "13a", "intl", "zh", "char", "none"] = Field(
        "auto", description="sacrebleu's tokeniser; auto chooses by the script of the gold answer"
    )
    lowercase: bool = Field(False, description="ignore case")


class Bleu(contracts.Scorer):
    """Geometric mean of n-gram precisions up to 4 with a brevity penalty, in [0, 1] (Papineni 2002; Post 2018)."""

    Options = Options

    def score(self, answer: str, gold: str, example: Example | None = None) -> Score:
        """Score one sentence (orders longer than the sentence are left out); counts stand in `parts.stats`."""
        chosen = self.options.tokenize
        if chosen == "auto":
            chosen = _TOKENIZER.get(script(gold), "char")
        found = _metric(chosen, self.options.lowercase).sentence_score(answer, [gold])
        stats = [found.sys_len, found.ref_len, *found.counts, *found.totals]
        value = _value(stats) if found.ref_len or found.sys_len else float(answer.strip() == gold.strip())
        return Score(value, parts={"stats": stats, "tokenize": chosen})

    def aggregate(self, scores: Sequence[Score]) -> float | None:
        """Corpus BLEU: sum the counts, then compute once."""
        stats = [score.parts["stats"] for score in scores if score.value is not None]
        return _value([sum(column) for column in zip(*stats, strict=True)]) if stats else None

    def signature(self) -> str:
        """What must be quoted with a BLEU value (sacrebleu's own form)."""
        fixed = "13a" if self.options.tokenize == "auto" else self.options.tokenize
        metric = _metric(fixed, self.options.lowercase)
        metric.sentence_score("a", ["a"])  # the signature is complete once something was scored
        told = str(metric.get_signature())
        return told.replace("tok:13a", "tok:13a/zh/char by script") if self.options.tokenize == "auto" else told


def _value(stats: Sequence[int]) -> float:
    """BLEU of [answer length, gold length, 4 matches, 4 totals]."""
    from sacrebleu.metrics.bleu import BLEU

    if not any(stats):
        return 1.0  # nothing was wanted and nothing was said
    found = BLEU.compute_bleu(
        correct=list(stats[2 : 2 + _ORDER]),
        total=list(stats[2 + _ORDER :]),
        sys_len=stats[0],
        ref_len=stats[1],
        smooth_method="exp",
        effective_order=True,
    )
    return min(1.0, found.score / 100)


@cache
def _metric(tokenize: str, lowercase: bool) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
