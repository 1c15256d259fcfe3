"""Shapes of the report's pictures: numbers and path strings only; the page's template draws and colours them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Point = tuple[float, float]
CURVE = {"width": 720.0, "height": 260.0, "left": 52.0, "right": 14.0, "top": 14.0, "bottom": 34.0}
FLOW = {"width": 720.0, "height": 240.0, "gap": 18.0, "bar": 12.0, "side": 150.0}
LABEL_X, LABEL_Y = 0.297, 0.156  # a point of the ribbons' curve before they cross: t = 1/4


def curve(training: Mapping[str, Any]) -> dict[str, Any]:
    """Loss curve of training and dev with its axes, on a log scale when losses span more than a factor of ten."""
    loss, dev = training["loss"], training["dev"]
    values = [value for _, value in (*loss, *dev) if value > 0]
    if not values:
        return {}
    log = max(values) > 10 * min(values)
    across = scale(0.0, max(step for step, _ in (*loss, *dev)), CURVE["left"], CURVE["width"] - CURVE["right"])
    ticks = _log_ticks(min(values), max(values)) if log else round_ticks(0.0, max(values))
    low, high = (min(values), max(values)) if log else (0.0, max(ticks[-1], max(values)))
    flat = scale(_log(low, log), _log(high, log), CURVE["height"] - CURVE["bottom"], CURVE["top"])

    def place(point: Point) -> Point:
        return across(point[0]), flat(_log(max(point[1], low), log))

    best = next(((step, value) for step, value in dev if step == training["best_step"]), None)
    return {
        **CURVE,
        "loss": line(map(place, loss)),
        "dev": line(map(place, dev)),
        "dots": [place(point) for point in dev],
        "best": {"at": place(best), "step": int(best[0]), "value": best[1]} if best else None,
        "x_ticks": [(across(step), f"{step:.0f}") for step in round_ticks(0.0, training["steps"])],
        "y_ticks": [(flat(_log(value, log)), f"{value:.3g}") for value in ticks if low <= value <= high],
        "log": log,
    }


def flow(counts: Mapping[str, int]) -> dict[str, Any]:
    """Ribbons from right or wrong before to right or wrong after; empty when there are no items."""
    total = sum(counts.values())
    if not total:
        return {}
    unit = (FLOW["height"] - FLOW["gap"]) / total
    before = counts["kept"] + counts["broken"], counts["fixed"] + counts["stuck"]
    after = counts["kept"] + counts["fixed"], counts["broken"] + counts["stuck"]
    left = {"kept": 0.0, "broken": counts["kept"] * unit}
    left |= {"fixed": before[0] * unit + FLOW["gap"], "stuck": (before[0] + counts["fixed"]) * unit + FLOW["gap"]}
    right = {"kept": 0.0, "fixed": counts["kept"] * unit}
    right |= {"broken": after[0] * unit + FLOW["gap"], "stuck": (after[0] + counts["broken"]) * unit + FLOW["gap"]}
    ends = FLOW["side"] + FLOW["bar"], FLOW["width"] - FLOW["side"] - FLOW["bar"]
    ribbons = [
        {
            "cell": cell,
            "count": counts[cell],
            "path": _ribbon(ends, left[cell], right[cell], counts[cell] * unit),
            "label": (
                ends[0] + LABEL_X * (ends[1] - ends[0]),
                left[cell] + LABEL_Y * (right[cell] - left[cell]) + counts[cell] * unit / 2,
            ),
            "thick": counts[cell] * unit,
        }
        for cell in ("kept", "stuck", "fixed", "broken")
        if counts[cell]
    ]
    return {**FLOW, "ribbons": ribbons, "before": _nodes(before, unit, total), "after": _nodes(after, unit, total)}


def _nodes(counts: tuple[int, int], unit: float, total: int) -> list[dict[str, Any]]:
    top = counts[0] * unit + FLOW["gap"]
    places = [(0.0, counts[0], "right"), (top, counts[1], "wrong")]
    return [
        {"y": y, "height": count * unit, "count": count, "name": name, "share": count / total}
        for y, count, name in places
        if count
    ]


def _ribbon(ends: Point, left: float, right: float, thick: float) -> str:
    """A band of even thickness between two heights, as an SVG path."""
    (start, end), middle = ends, sum(ends) / 2

    def edge(begin: str, here: float, a: float, there: float, b: float) -> str:
        return f"{begin}{here:.1f},{a:.1f} C{middle:.1f},{a:.1f} {middle:.1f},{b:.1f} {there:.1f},{b:.1f}"

    return f"{edge('M', start, left, end, right)} {edge('L', end, right + thick, start, left + thick)} Z"


def scale(low: float, high: float, start: float, end: float) -> Any:
    """A function from values to places on an axis."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def line(points: Any) -> str:
    """Points as SVG writes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _log(value: float, log: bool) -> float:
    return math.log(value) if log else value


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from low to just above high."""
    rough = (high - low) / wanted or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [low + step * i for i in range(math.floor((high - low) / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> Sequence[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
