"""`luthier models list`: what can be tuned by name, and what is here already."""

from __future__ import annotations

from typing import Any

from luthier.model import catalog


def table() -> list[dict[str, Any]]:
    """One row for each model of the catalog; the keys are stable."""
    return [
        {
            "name": entry.name,
            "parameters": entry.parameters,
            "chat": entry.chat,
            "here": catalog.cached(entry.name) is not None,
            "licence": entry.licence,
            "source": entry.sources[0].note,
            "note": entry.note,
        }
        for entry in catalog.entries()
    ]


def short_table() -> list[dict[str, Any]]:
    """The same for a terminal."""
    return [
        {
            "name": row["name"],
            "size": f"{row['parameters'] / 1e6:,.{0 if row['parameters'] > 1e6 else 1}f} M",
            "here": row["here"],
            "licence": row["licence"],
            "note": row["note"],
        }
        for row in table()
    ]
