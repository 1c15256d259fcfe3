"""`luthier runs`: the runs of a folder, newest first, each with where it stands and what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier import store
from luthier.errors import LuthierError


def table(folder: str | Path = "runs") -> list[dict[str, Any]]:
    """One row for each run; the keys are stable. Runs whose files cannot be read are listed as damaged."""
    found = [_row(store.Run(path.parent)) for path in Path(folder).glob("*/run.yaml")]
    return sorted(found, key=lambda row: (row["began"] or "", row["name"]), reverse=True)


def _row(run: store.Run) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(
        ("name", "status", "began", "model", "metric", "base", "tuned", "difference", "n")
    )
    row["name"] = run.name
    try:
        record = store.read_json(run.record) if run.record.exists() else {}
        report = store.read_json(run.report) if run.report.exists() else {}
        row |= {"status": record.get("status", "unknown"), "began": record.get("began")}
        if report:
            row["model"] = report["model"]
            row |= {key: report["primary"][key] for key in ("metric", "n")}
            row |= {key: round(report["primary"][key], 4) for key in ("base", "tuned", "difference")}
    except (LuthierError, KeyError, TypeError):
        row["status"] = "damaged"
    return row
