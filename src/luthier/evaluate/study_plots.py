"""Shapes of a study's pictures: numbers and path strings only; the page's template draws and colours them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.evaluate import plots

FIELD = {"width": 820.0, "height": 380.0, "left": 62.0, "right": 22.0, "top": 18.0, "bottom": 50.0}
SMALL = {"width": 260.0, "height": 190.0, "left": 46.0, "right": 12.0, "top": 12.0, "bottom": 30.0}
LABEL = (7.6, 17.0)  # width of a letter and height of a line, for keeping labels apart
Box = tuple[float, float, float, float]  # left, top, right, bottom


def scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """Score against trained parameters on a log axis, each with its interval and a label that covers no other."""
    rows = [row for row in report["methods"] if row["status"] == "judged"]
    if not rows:
        return {}
    counts = [row["trainable"] for row in rows]
    base = report["base"]
    lows = [one["low"] for one in (base, *(row["score"] for row in rows))]
    highs = [one["high"] for one in (base, *(row["score"] for row in rows))]
    low, high = _rounded(min(lows), max(highs))
    first, last = _powers(min(counts), max(counts))
    across = plots.scale(first, last, FIELD["left"], FIELD["width"] - FIELD["right"])
    up = plots.scale(low, high, FIELD["height"] - FIELD["bottom"], FIELD["top"])
    points = [
        {
            "label": row["label"], "x": across(math.log10(row["trainable"])), "y": up(row["score"]["value"]),
            "low": up(row["score"]["low"]), "high": up(row["score"]["high"]), "tied": row["tied"],
            "take": row["label"] == report["advice"]["take"],
        }
        for row in rows
    ]  # fmt: skip
    _apart(points)
    return {
        **FIELD,
        "points": points,
        "base": {"y": up(base["value"]), "low": up(base["low"]), "high": up(base["high"])},
        "x_ticks": [(across(power), _count(10**power)) for power in range(math.ceil(first), math.floor(last) + 1)],
        "y_ticks": [(up(value), f"{100 * value:.0f} %") for value in plots.round_ticks(low, high)],
    }


def searches(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Dev loss against learning rate, one small picture for each method, all on one height so that they compare."""
    rows = [row for row in report["methods"] if row["search"] and row["search"]["curve"]]
    losses = [one["loss"] for row in rows for one in row["search"]["curve"] if one["loss"] is not None]
    if not losses:
        return []
    ceiling = max(report["base"]["dev_loss"], min(losses) * 1.05)
    return [{**small(row["search"], low=min(losses), high=ceiling), "label": row["label"]} for row in rows]


def small(search: Mapping[str, Any], *, low: float, high: float) -> dict[str, Any]:
    """One method's curve, a line for each rung; a loss above `high`, or a divergence, stands at the upper edge."""
    curve = search["curve"]
    rates = [one["rate"] for one in curve]
    edge = 0.06 * (math.log(max(rates) / min(rates)) or 1.0)
    across = plots.scale(
        math.log(min(rates)) - edge, math.log(max(rates)) + edge, SMALL["left"], SMALL["width"] - SMALL["right"]
    )
    margin = 0.08 * (high - low or 1.0)
    up = plots.scale(low - margin, high + margin, SMALL["height"] - SMALL["bottom"], SMALL["top"])

    def place(one: Mapping[str, Any]) -> dict[str, Any]:
        lost = one["loss"] is None or one["loss"] > high
        return {"x": across(math.log(one["rate"])), "y": up(high if lost else one["loss"]), "lost": lost}

    lengths = sorted({one["steps"] for one in curve})
    lines = [
        {"steps": steps, "dots": [place(one) for one in _by_rate(curve, steps)], "last": steps == lengths[-1]}
        for steps in lengths
    ]  # fmt: skip
    for line in lines:
        line["points"] = plots.line((dot["x"], dot["y"]) for dot in line["dots"])
    chosen = next((one for one in curve if one["rate"] == search["rate"] and one["steps"] == lengths[-1]), None)
    return {
        **SMALL,
        "at_edge": search["at_edge"],
        "lines": lines,
        "chosen": None if chosen is None else {**place(chosen), "rate": f"{chosen['rate']:.1e}"},
        "x_ticks": [(across(math.log(rate)), f"{rate:.0e}".replace("e-0", "e-")) for rate in (min(rates), max(rates))],
        "y_ticks": [(up(value), f"{value:.3g}") for value in (low, high)],
    }


def _by_rate(curve: Sequence[Mapping[str, Any]], steps: int) -> list[Mapping[str, Any]]:
    return sorted((one for one in curve if one["steps"] == steps), key=lambda one: one["rate"])


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Bounds of an axis of shares: some room, in round numbers, within what can be."""
    room = 0.06 * (high - low or 0.1)
    step = 0.05 if high - low > 0.15 else 0.01
    down = math.floor((low - room) / step + 1e-9) * step
    up = math.ceil((high + room) / step - 1e-9) * step
    return max(0.0, down), min(1.0, up) if high <= 1 else up


def _powers(least: float, most: float) -> tuple[float, float]:
    """Log bounds with room for points and labels at both ends."""
    low, high = math.log10(least), math.log10(most)
    room = max(0.35, 0.08 * (high - low))
    return low - room, high + 2 * room


def _count(value: float) -> str:
    for power, letter in ((9, "B"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.0f} {letter}"
    return f"{value:.0f}"


def _apart(points: Sequence[dict[str, Any]]) -> None:
    """Give each point the first place for its label that covers no whisker and no other label."""
    taken: list[Box] = [(p["x"] - 5, p["high"] - 2, p["x"] + 5, p["low"] + 2) for p in points]
    for point in points:
        wide = LABEL[0] * len(point["label"])
        choices = [_choice(point, wide, offset, side) for offset in (0, -17, 17, -34, 34, -51, 51) for side in (1, -1)]
        best = min(choices, key=lambda choice: _overlap(choice[1], taken))
        point |= {"label_x": best[0][0], "label_y": best[0][1] + 4.5, "anchor": best[2]}
        taken.append(best[1])


def _choice(point: Mapping[str, Any], wide: float, offset: float, side: int) -> tuple[tuple[float, float], Box, str]:
    x, y = point["x"] + 11 * side, point["y"] + offset
    left = x if side > 0 else x - wide
    return (x, y), (left, y - LABEL[1] / 2, left + wide, y + LABEL[1] / 2), "start" if side > 0 else "end"


def _overlap(box: Box, taken: Sequence[Box]) -> float:
    """Area that a box shares with others; being outside of the picture costs as much as lying on a label."""
    outside = max(0.0, FIELD["left"] - box[0]) + max(0.0, box[2] - FIELD["width"])
    outside += max(0.0, FIELD["top"] - box[1]) + max(0.0, box[3] - FIELD["height"] + FIELD["bottom"])
    shared: Callable[[Box], float] = lambda other: (  # noqa: E731
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
    )
    return outside * LABEL[1] + sum(map(shared, taken))
