"""Exact match: the answer is the gold answer, by default up to case, spacing and outer punctuation."""

from __future__ import annotations

from pydantic import Field

from luthier import contracts
from luthier.records import Example, Score
from luthier.scorers import _json

_OPEN = "\"'`“”‘’«»„「『《【（([{"
_CLOSE = "\"'`“”‘’«»」』》】）)]}.,;:!?…。，、；：！？"


class Options(contracts.Options):
    """What may differ in a right answer."""

    strict: bool = Field(False, description="every character counts; else case, spacing and outer punctuation do not")
    json_values: bool = Field(True, description="compare JSON records as values: key order and layout do not count")


class Exact(contracts.Scorer):
    """1 when the answer equals the gold answer, else 0."""

    binary = True

    Options = Options

    def score(self, answer: str, gold: str, example: Example | None = None) -> Score:
        """Compare one answer with its gold."""
        if answer == gold:
            return Score(1.0)
        if self.options.json_values and gold.lstrip()[:1] in ("{", "["):
            same = self._same_record(answer, gold)
            if same is not None:
                return Score(float(same))
        return Score(float(not self.options.strict and normal(answer) == normal(gold)))

    def _same_record(self, answer: str, gold: str) -> bool | None:
        """Compare as JSON values; None when the gold is not JSON."""
        values: _json.Values = "strict" if self.options.strict else "normal"
        try:
            wanted = _json.key_of(_json.parse(gold), values)
        except _json.Unparsable:
            return None
        try:
            return bool(_json.key_of(_json.parse(answer), values) == wanted)
        except _json.Unparsable:
            return False


def normal(text: str) -> str:
    """Fold case and spacing and peel quotes, brackets and end marks off; a text of only those stays."""
    folded = _json.fold(text)
    return folded.rstrip(_CLOSE + " ").lstrip(_OPEN + " ") or folded
