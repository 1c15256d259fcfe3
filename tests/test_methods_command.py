"""`luthier methods`: the table, the pages, the drawing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from luthier import cli, registry
from luthier.flows import methods as flow
from luthier.flows.drawing import SITES, draw

NAMES = registry.names("methods")


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_page(name):
    told = flow.page(name)
    assert told["family"] in flow.FAMILIES
    assert len(told["text"].split()) >= 25 and told["text"].endswith(".")
    assert told["title"] and told["formula"] and told["trains"]
    assert re.search(r"\b(19|20)\d\d\b|\d{4}\.\d{5}", told["source"]), "a year or a paper's number"
    assert all(option["what"] for option in told["options"]), "every option says what it does"
    assert "◀━━" in told["drawing"]
    assert set(registry.find("methods", name).about.sites) <= SITES.keys()
    console = Console(width=80, record=True)
    flow.print_page(told, console)
    assert told["title"] in console.export_text()


@pytest.mark.parametrize("name", [name for name in NAMES if not flow.needs_options(name)])
def test_the_numbers_are_sane(name):
    row = flow.row(name)
    low, high = row["bracket"]
    assert 0 < low < high < 1 and low <= row["learning_rate"] <= high
    assert 0 < row["share"] <= 2.01, "diff pruning trains twice what there is"
    assert 0 < row["saved_bytes"] <= 4.1 * flow.base_parameters()
    assert row["fresh"] in ("exact", "tolerance") or row["fresh"].startswith("changes: ")


def test_the_table_is_sorted_by_family():
    families = [row["family"] for row in flow.table()]
    assert families == sorted(families, key=flow.FAMILIES.index)
    console = Console(width=80, record=True)
    flow.print_table(flow.table(), console)
    printed = console.export_text()
    assert all(row["name"] in printed for row in flow.table())


@pytest.mark.parametrize("site", SITES)
def test_every_site_is_drawn_somewhere(site):
    drawing = draw([site])
    assert SITES[site] in drawing
    assert max(map(len, drawing.splitlines())) <= 80


def test_the_reference_model_counts():
    assert flow.base_parameters() == 134_515_008
    assert flow.measured("ia3")[0] == 57_600


def test_the_command_prints_json(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["methods", "lora", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["name"] == "lora"


def test_an_unknown_method_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["methods", "loraa"])
    assert ended.value.code == 2
    assert "did you mean 'lora'" in capsys.readouterr().err


def test_the_documentation_shows_the_shelf_as_it_is():
    """`luthier methods --markdown` writes the table of docs/methods.md."""
    told = (Path(__file__).parents[1] / "docs" / "methods.md").read_text("utf-8")
    assert flow.markdown(flow.table()) in told
