"""JSON fields: which share of the gold record's fields has the right value.

Finding the JSON in the answer (`_json.extract`) is kept apart from judging it. Objects are opened into dotted paths
(`address.city`), lists of objects are aligned one to one so that most fields agree, other lists are one value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from luthier import contracts
from luthier.records import Example, Score
from luthier.scorers import _json

ROOT = "$"  # the path of a value that is the whole answer
Leaves = dict[str, Any]  # path -> value


class Options(contracts.Options):
    """What counts as the same value."""

    values: Literal["strict", "normal", "lenient"] = Field(
        "normal",
        description="strict: type and text alike; normal: but for case and spacing, and 3 = 3.0; lenient: also '3' = 3",
    )
    null_is_missing: bool = Field(False, description="a field that is null and one that is left out are the same")
    ordered: bool = Field(True, description="the order of a list of plain values counts")


class JsonFields(contracts.Scorer):
    """Mean share of right fields. An answer without JSON is wrong (0), a gold that is not JSON is UNSCORED.

    Parts: `parsed`, `strict` (the whole answer is JSON), `exact` (all fields right and none invented), `fields`
    (path -> match | mismatch | omitted | invented), `gold` and `values` (path -> value).
    """

    Options = Options

    def score(self, answer: str, gold: str, example: Example | None = None) -> Score:
        """Judge one answer; the value is the share of the gold's fields, nested ones counted apiece."""
        try:
            wanted = _json.parse(gold.strip())
        except _json.Unparsable as error:
            return Score(None, f"the gold answer is not JSON ({error})")
        try:
            told, strict = _json.extract(answer, type(wanted))
        except _json.Unparsable:
            return self._judged(wanted, None, parsed=False, strict=False)
        return self._judged(wanted, told, parsed=True, strict=strict)

    def _judged(self, wanted: Any, told: Any, *, parsed: bool, strict: bool) -> Score:
        gold: Leaves = {}
        values: Leaves = {}
        if parsed:
            self._open(wanted, told, "", gold, values)
        else:
            _spread(wanted, ROOT, gold)
        fields = {path: self._tag(path, gold, values) if parsed else "omitted" for path in gold}
        fields |= {path: "invented" for path in values if path not in gold and not self._nothing(values[path])}
        right = sum(fields[path] == "match" for path in gold)
        exact = parsed and all(tag == "match" for tag in fields.values())
        value = right / len(gold) if gold else float(exact)
        parts = {"parsed": parsed, "strict": strict, "exact": exact, "fields": fields, "gold": gold, "values": values}
        return Score(value, parts=parts)

    def _tag(self, path: str, gold: Leaves, values: Leaves) -> str:
        if path not in values:
            return "match" if self._nothing(gold[path]) else "omitted"
        return "match" if self._key(gold[path]) == self._key(values[path]) else "mismatch"

    def _nothing(self, value: Any) -> bool:
        return bool(self.options.null_is_missing) and value is None

    def _key(self, value: Any) -> Any:
        """A hashable form in which equal values are equal, as the options say."""
        if isinstance(value, list) and not self.options.ordered:
            return "bag", tuple(sorted(repr(self._key(inner)) for inner in value))
        if isinstance(value, dict) and self.options.null_is_missing:
            value = {name: inner for name, inner in value.items() if inner is not None}
        return _json.key_of(value, self.options.values)

    def _open(self, wanted: Any, told: Any, path: str, gold: Leaves, values: Leaves) -> None:
        """Fill `gold` and `values` with leaves; a kind of value that differs is one wrong leaf on the told side."""
        if isinstance(wanted, dict) and isinstance(told, dict):
            for name in [*wanted, *(name for name in told if name not in wanted)]:
                self._sides(wanted, told, name, f"{path}.{name}" if path else name, gold, values)
        elif _records(wanted) and isinstance(told, list):
            self._open_list(wanted, told, path, gold, values)
        else:
            _spread(wanted, path or ROOT, gold)
            _spread(told, path or ROOT, values)

    def _sides(
        self, wanted: Mapping[Any, Any], told: Mapping[Any, Any], name: Any, path: str, gold: Leaves, values: Leaves
    ) -> None:
        if name in wanted and name in told:
            self._open(wanted[name], told[name], path, gold, values)
        elif name in wanted:
            _spread(wanted[name], path, gold)
        else:
            _spread(told[name], path, values)

    def _open_list(self, wanted: list[Any], told: list[Any], path: str, gold: Leaves, values: Leaves) -> None:
        """Align told records with gold ones (most equal fields in all), then open the pairs; the rest is invented."""
        partner = self._align(wanted, told)
        mine = {index: told[partner[index]] for index in range(len(wanted)) if index in partner}
        left = [item for place, item in enumerate(told) if place not in set(partner.values())]
        extra = {len(wanted) + index: item for index, item in enumerate(left)}
        gold_by, told_by = dict(enumerate(wanted)), {**mine, **extra}
        for index in [*gold_by, *extra]:
            self._sides(gold_by, told_by, index, f"{path}[{index}]", gold, values)

    def _align(self, wanted: list[Any], told: list[Any]) -> dict[int, int]:
        from scipy.optimize import linear_sum_assignment

        if not told:
            return {}
        gain = [[self._agreement(one, other) for other in told] for one in wanted]
        rows, columns = linear_sum_assignment(gain, maximize=True)
        return {int(row): int(column) for row, column in zip(rows, columns, strict=True)}

    def _agreement(self, one: Any, other: Any) -> int:
        """How many leaves of two records are equal."""
        left, right = _spread(one, "", {}), _spread(other, "", {})
        return sum(path in right and self._key(left[path]) == self._key(right[path]) for path in left)


def _records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _spread(value: Any, path: str, leaves: Leaves) -> Leaves:
    """Add the leaves of one value: objects and lists of objects are opened, empty ones and all else are leaves."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            _spread(inner, f"{path}.{name}" if path and path != ROOT else str(name), leaves)
    elif _records(value):
        for index, inner in enumerate(value):
            _spread(inner, f"{path}[{index}]", leaves)
    else:
        leaves[path] = value
    return leaves
