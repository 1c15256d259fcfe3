"""A study in a terminal: the table of methods and the sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.evaluate import wording
from luthier.evaluate.study_report import size
from luthier.text.show import visible


def print_study(report: Mapping[str, Any], console: Console) -> None:
    """Every method's numbers, best first, what was given up, and the advice."""
    metric = report["metric"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for name in (f"{metric} (95 %)", "to the best", "rate", "dev loss", "trained", "file", "peak", "s/step", "speed"):
        table.add_column(name, justify="right")
    base = report["base"]
    table.add_row("base", _score(base), "", "", f"{base['dev_loss']:.4f}")
    for row in report["methods"]:
        if row["status"] == "judged":
            table.add_row(*(Text(cell) for cell in _cells(row)))
        else:
            table.add_row(Text(visible(row["label"])), Text(row["status"], "yellow"))
    console.print(table)
    for row in report["methods"]:
        if row["status"] != "judged":
            console.print(Text(visible(f"{row['label']}: {row['why']}"), "yellow"), soft_wrap=True)
        elif row["search"] and row["search"]["at_edge"]:
            text = f"{row['label']}: the best rate is the outermost that was tried; a better one may lie beyond"
            console.print(Text(visible(text), "yellow"), soft_wrap=True)
    for text in report["said"]:
        console.print(Text(visible(text), "yellow"), soft_wrap=True)
    console.print(Text(visible(report["sentence"]), "bold"), soft_wrap=True)
    if report["advice"]["command"]:
        console.print(Text(visible(report["advice"]["command"])), soft_wrap=True)


def _cells(row: Mapping[str, Any]) -> list[str]:
    mark = "=" if row["tied"] else ""
    gap = row["to_best"]
    behind = f"tie {mark}" if row["tied"] else wording.points(gap["difference"])
    return [
        visible(row["label"]),
        _score(row["score"]),
        "best" if gap is None else behind,
        f"{row['learning_rate']:.2g}",
        f"{row['dev_loss']:.4f}",
        f"{row['trainable']:,} ({wording.percent(row['share'], 2)})",
        size(row["adapter_bytes"]),
        "" if row["memory"] is None else f"{row['memory'] / 2**30:.2f} GiB",
        f"{row['step_seconds']:.2g}",
        speeds(row),
    ]


def speeds(row: Mapping[str, Any]) -> str:
    """Speed of answering as a share of the base's: attached, and merged where it merges."""
    told = [row["speed"][way] for way in ("attached", "merged")]
    return " / ".join("-" if one is None else f"{one['ratio']:.2f}" for one in told)


def _score(told: Mapping[str, Any]) -> str:
    return f"{wording.percent(told['value'])} ({wording.percent(told['low'])} to {wording.percent(told['high'])})"
