"""What the steps of a training run tell: the loss curve, the over-fit alarm, what sharing prefixes saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CURVE_POINTS = 240  # more than a picture can show
RISE = 1.01  # a dev loss this much above the best is more than rounding

Steps = Sequence[Mapping[str, Any]]
Point = tuple[float, float]


def training_of(steps: Steps, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Loss by step, dev loss, the best step and the over-fit alarm; the loop's own outcome wins where it speaks."""
    if not steps:
        return {}
    dev = [(float(step["index"]), step["dev_loss"]) for step in steps if step.get("dev_loss") is not None]
    best = min(dev, key=lambda point: point[1]) if dev else None
    return {
        "loss": _thinned([(float(step["index"]), step["loss"]) for step in steps]),
        "dev": dev,
        "steps": len(steps),
        "epochs": steps[-1]["epoch"],
        "best_step": outcome.get("best_step") or (int(best[0]) if best else None),
        "best_dev_loss": outcome.get("best_dev_loss") or (best[1] if best else None),
        "restored_step": outcome.get("restored_step"),
        "overfit": outcome.get("overfit", _overfit(dev)),
        "ended": outcome.get("ended", ""),
        "trainable": outcome.get("trainable"),
    }


def sharing_of(steps: Steps) -> dict[str, Any]:
    """Tokens computed against the tokens that separate rows would have cost, and speed."""
    if not steps:
        return {}
    computed, plain = (sum(step[key] for step in steps) for key in ("tokens", "plain_tokens"))
    seconds, examples = (sum(step[key] for step in steps) for key in ("seconds", "examples"))
    return {
        "tokens": computed,
        "plain_tokens": plain,
        "ratio": plain / computed if computed else 1.0,
        "seconds": seconds,
        "examples": examples,
        "examples_per_second": examples / seconds if seconds else None,
        "tokens_per_second": plain / seconds if seconds else None,
        "memory": max(step["memory"] for step in steps),
    }


def _overfit(dev: Sequence[Point]) -> str:
    if not dev:
        return ""
    best = min(dev, key=lambda point: point[1])
    if dev[-1][1] < best[1] * RISE:
        return ""
    return f"the dev loss rose from {best[1]:.4f} at step {best[0]:.0f} to {dev[-1][1]:.4f} at step {dev[-1][0]:.0f}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Mean of neighbouring points, so that a long run draws as a short one."""
    size = -(-len(points) // CURVE_POINTS)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(block[-1][0], sum(loss for _, loss in block) / len(block)) for block in blocks]
