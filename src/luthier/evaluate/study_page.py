"""A study as one offline page, in the looks and under the rules of the run's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import store
from luthier.evaluate import page, study_plots, study_report, wording

TEMPLATE = "study.html.jinja"


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write a study as one self-contained HTML file, atomically."""
    store.write_text(path, render(report))


def render(report: Mapping[str, Any]) -> str:
    """The page's HTML; every text is escaped."""
    pictures = {"scores": study_plots.scores(report), "searches": study_plots.searches(report)}
    template = page.template_environment().get_template(TEMPLATE)
    return template.render(report=report, pictures=pictures, size=study_report.size, lasting=wording.lasting)
