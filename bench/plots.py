"""Draw the ratios of kept comparisons: how many times faster luthier is than each other arm, with the rounds' range.

    python bench/plots.py                  docs/benchmarks/*.json to docs/benchmarks/speed.png

Only runs with all of a machine's threads are drawn. Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gain import ratio
from rows import ROOT

FOLDER = ROOT / "docs" / "benchmarks"
ARMS = {  # arm: how the picture calls it, colour
    "trl_default": ("TRL as installed", "#b8b8b8"),
    "trl_tuned": ("TRL tuned", "#4477aa"),
    "plain": ("plain loop", "#66a182"),
    "unshared": ("luthier without sharing", "#ddaa33"),
}
HEIGHT = 0.8  # of a data set's bars together


def comparisons(folder: Path) -> list[dict[str, Any]]:
    """Kept comparisons with luthier in them and at full threads, least sharing first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text("utf-8"))
        machine = told.get("machine") if isinstance(told, dict) else None
        if machine and told.get("summary", {}).get("ratios") and machine["threads"] == machine["cores"]:
            found.append(told)
    return sorted(found, key=lambda told: told["facts"]["shared_share"])


def bars(told: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Ratio, least and most of each arm of one comparison."""
    return {
        arm: (one["median"], one["low"], one["high"])
        for arm in ARMS
        if arm in told["summary"]["ratios"]
        for one in [ratio(told["runs"], "luthier", arm)]
    }


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [(told, bars(told)) for told in found]
    heights = sum(max(1, len(one)) for _, one in rows)
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.34 * heights + 0.25 * len(rows)), layout="constrained")
    for place, (_, one) in enumerate(rows):
        size = HEIGHT / max(1, len(one))
        for number, (arm, (middle, low, high)) in enumerate(one.items()):
            at = place - HEIGHT / 2 + size * (number + 0.5)
            name, colour = ARMS[arm]
            axes.barh(at, middle - 1, size * 0.9, left=1, color=colour, label=name)  # from equal on
            around = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            axes.errorbar(middle, at, xerr=around, color="#333333", capsize=3, lw=1)
            axes.annotate(f"{middle:.3g}", (max(high, middle), at), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [_name(told) for told, _ in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="#333333", lw=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.12)
    axes.set_xlabel("rows a second: luthier over the other; lines from least to most of the rounds (log scale)")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    machine = found[0]["machine"]
    axes.set_title(f"Tuning, side by side ({machine['dtype']}, {machine['capability']}, {machine['cores']} cores)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _name(told: dict[str, Any]) -> str:
    facts = told["facts"]
    return f"{told['data']}\n{facts['shared_prefix']} of {facts['tokens_per_row']:.0f} tokens shared"


def main() -> int:
    """Draw what is kept; 1 where nothing is."""
    found = comparisons(FOLDER)
    if not found:
        print(f"no comparison is kept in {FOLDER}: python bench/sft_vs_trl.py --out ...", file=sys.stderr)
        return 1
    draw(found, FOLDER / "speed.png")
    print(FOLDER / "speed.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
