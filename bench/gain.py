"""What the runs of a comparison come to: medians, ratios with their ranges, and the split of the gain."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range by arm, and luthier's ratio to every other arm with its range over rounds."""
    summary: dict[str, Any] = {}
    for arm in dict.fromkeys(result["arm"] for result in results):
        mine = [result for result in results if result["arm"] == arm]
        speeds = [result["examples_per_second"] for result in mine]
        summary[arm] = {
            "examples_per_second": round(statistics.median(speeds), 3),
            "range": [round(min(speeds), 3), round(max(speeds), 3)],
            "peak_mib": round(statistics.median(result["peak_mib"] for result in mine)),
            "dev_loss": mine[-1]["dev_loss"],
            **{name: _spread([result[name] for result in mine]) for name in WORK if name in mine[0]},
        }
    if "luthier" in summary:
        others = [arm for arm in summary if arm != "luthier"]
        found = {arm: ratio(results, "luthier", arm) for arm in others}
        summary["ratios"] = {arm: round(one["median"], 2) for arm, one in found.items()}
        summary["ratio_ranges"] = {arm: [round(one["low"], 2), round(one["high"], 2)] for arm, one in found.items()}
    return summary


WORK = (
    "tokens", "plain_tokens", "targets", "gflop", "gflops", "limit_gflops", "share_of_limit", "less_work_by_sharing",
    "less_work_by_logits",
)  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range, to four digits that matter."""
    told = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.4g}") for name, value in told.items()}


def ratio(results: Sequence[dict[str, Any]], one: str, other: str) -> dict[str, float]:
    """How many times faster `one` is than `other`: the ratio of medians, and the range of the rounds' own ratios."""
    fast, slow = ([r["examples_per_second"] for r in results if r["arm"] == arm] for arm in (one, other))
    rounds = [a / b for a, b in zip(fast, slow, strict=False)]
    return {"median": statistics.median(fast) / statistics.median(slow), "low": min(rounds), "high": max(rounds)}


# (arm, against which arm, what the difference between the two is)
STEPS_OF_GAIN = (
    ("trl_tuned", "trl_default", "settings that TRL has: dtype, no checkpointing, grouping"),
    ("plain", "trl_tuned", "logits where something is predicted, no trainer"),
    ("unshared", "plain", "no padding, fused layers, one flat optimiser"),
    ("unshared", "trl_tuned", "all but sharing"),
    ("luthier", "unshared", "sharing"),
)


def split(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The gain, arm by arm where both were run; and for sharing, how much of it is less work and how much is lost.

    `work` is how many times fewer operations are needed; `kept` the share of it that became speed.
    """
    arms = {result["arm"] for result in results}
    told: dict[str, Any] = {}
    for arm, other, what in STEPS_OF_GAIN:
        if {arm, other} <= arms:
            told[f"{arm} / {other}"] = {"what": what, **_spread_of(ratio(results, arm, other))}
    ours = [result for result in results if result["arm"] == "luthier" and "less_work_by_sharing" in result]
    if ours:
        work = statistics.median(result["less_work_by_sharing"] for result in ours)
        told["work"] = {
            "sharing": round(work, 3),
            "logits": round(statistics.median(result["less_work_by_logits"] for result in ours), 3),
        }
        shared = told.get("luthier / unshared")
        if shared:
            told["work"]["kept_of_sharing"] = round(shared["median"] / work, 3)
    return told


def _spread_of(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in found.items()}


def print_split(name: str, results: Sequence[dict[str, Any]]) -> None:
    """Tell where the gain comes from."""
    found = split(results)
    print(f"{name}: the split of the gain")
    for pair, one in found.items():
        if pair != "work":
            print(f"  {pair}: {one['median']} times ({one['low']} to {one['high']}): {one['what']}")
    if "work" in found:
        work = found["work"]
        kept = f", of which {work['kept_of_sharing']:.0%} became speed" if "kept_of_sharing" in work else ""
        print(
            f"  less work: {work['sharing']} times by sharing{kept}; {work['logits']} times by logits at targets only"
        )
    if len(found) < 2:
        print("  needs runs of two neighbouring arms: --arms trl_tuned plain unshared luthier")
