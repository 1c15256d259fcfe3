"""Numbers and verdicts in plain words: one place, so that page, terminal and JSON say the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MINUS = "\u2212"


def percent(value: float, digits: int = 1) -> str:
    """0.834 -> `83.4 %`."""
    return f"{100 * value:.{digits}f} %".replace("-", MINUS)


def points(value: float, sign: bool = True) -> str:
    """0.713 -> `+71.3`: a difference of rates in percentage points."""
    number = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return ("0.0" if float(number) == 0 else number).replace("-", MINUS)


def chance(p: float) -> str:
    """A p-value as people write it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def verdict(found: Mapping[str, Any]) -> str:
    """One comparison in a sentence with its numbers."""
    metric, n = found["metric"], found["n"]
    base, tuned = percent(found["base"]), percent(found["tuned"])
    low, high = points(found["low"], sign=False), points(found["high"], sign=False)
    if found["verdict"] in ("better", "worse"):
        moved = "rose" if found["difference"] > 0 else "fell"
        change = f"{points(found['difference'])} points, 95 % interval {low} to {high}, n = {n}"
        return f"{metric} {moved} from {base} to {tuned} ({change})"
    between = f"between {points(found['low'])} and {points(found['high'])} points (95 %, n = {n})"
    if found["verdict"] == "same":
        return f"{metric} is the same within 2 points: {base} before, {tuned} after, the difference is {between}"
    head = f"Cannot tell whether {metric} changed: {base} before, {tuned} after, the true difference lies {between}"
    return head + _more(found["needed"])


def _more(needed: int | None) -> str:
    if needed is None:
        return ""
    return f"; with about {rounded(needed)} more items a difference of this size would show"


def rounded(count: int) -> str:
    """A rough count: two digits that matter, thousands set apart."""
    scale = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // scale) * scale:,}"


def changes(counts: Mapping[str, int]) -> str:
    """`118 fixed, 1 broken`."""
    return f"{counts['fixed']} fixed, {counts['broken']} broken"


def size(count: float) -> str:
    """Bytes in the unit that people expect of a file: `46 kB`, `20 MB`, `3.68 GB`."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 0), ("kB", 1e3, 0)):
        if count >= scale:
            return f"{count / scale:.{digits}f} {unit}"
    return f"{count:.0f} B"


def lasting(seconds: float) -> str:
    """A rough time: `45 s`, `12 min`, `1.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
