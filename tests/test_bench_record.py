"""The scripts of the comparisons: what counts as a fall, how the gain is split, what is drawn."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {"dtype": "float32", "capability": "AVX2", "cores": 2, "threads": 2, "date": "2026-01-01"}
SPEEDS = {
    "trl_default": [0.1, 0.1],
    "trl_tuned": [1.0, 1.1],
    "plain": [2.0, 2.0],
    "unshared": [2.5, 2.5],
    "luthier": [10.0, 11.0],
}


@pytest.fixture(scope="module")
def scripts():
    """The modules of bench/, which find each other beside them."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import gain
        import plots
        import record
        import rows

        yield {"gain": gain, "plots": plots, "record": record, "rows": rows}
    finally:
        sys.path.remove(str(ROOT / "bench"))


def comparison(scripts, arms=("trl_tuned", "luthier"), slower: float = 1.0, data: str = "demo") -> dict:
    """A comparison as `sft_vs_trl.py` keeps it, with luthier so many times slower than usual."""
    runs = [
        {
            "arm": arm,
            "examples_per_second": speed / (slower if arm == "luthier" else 1),
            "peak_mib": 1,
            "dev_loss": None,
        }
        for number in range(2)
        for arm in arms
        for speed in [SPEEDS[arm][number]]
    ]
    return {
        "data": data, "facts": {"shared_share": 0.8, "shared_prefix": 300, "tokens_per_row": 375.5}, "machine": MACHINE,
        "settings": {"batch": 16, "steps": 2, "rounds": 2}, "summary": scripts["gain"].summarise(runs), "runs": runs,
    }  # fmt: skip


def test_ratios_come_with_the_range_of_the_rounds(scripts):
    summary = comparison(scripts)["summary"]
    assert summary["ratios"] == {"trl_tuned": 10.0}
    assert summary["ratio_ranges"] == {"trl_tuned": [10.0, 10.0]}
    assert scripts["gain"].ratio(comparison(scripts)["runs"], "luthier", "trl_tuned") == {
        "median": 10,
        "low": 10,
        "high": 10,
    }


@pytest.mark.parametrize("slower, fell", [(1.0, False), (0.8, False), (1.17, False), (1.18, True), (3.0, True)])
def test_a_ratio_that_fell_by_more_than_its_allowance_is_found(scripts, slower, fell):
    record = scripts["record"]
    recorded = record.kept({}, comparison(scripts))
    (finding,) = record.compare(recorded, comparison(scripts, slower=slower))
    assert finding.fell is fell and ("FELL" in str(finding)) is fell
    assert finding.recorded == 10.0


def test_another_class_of_machine_has_its_own_record(scripts):
    record = scripts["record"]
    recorded = record.kept({}, comparison(scripts))
    other = {**comparison(scripts, slower=9), "machine": {**MACHINE, "dtype": "bfloat16"}}
    (finding,) = record.compare(recorded, other)
    assert finding.recorded is None and not finding.fell and "nothing is recorded" in str(finding)
    both = record.kept(recorded, other)
    assert set(both) == {"float32, AVX2, 2 cores", "bfloat16, AVX2, 2 cores"}
    assert both["float32, AVX2, 2 cores"] == recorded["float32, AVX2, 2 cores"], "what was recorded stays"


def test_records_are_kept_and_a_fall_fails(scripts, tmp_path, capsys):
    record, into = scripts["record"], tmp_path / "recorded.json"
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(comparison(scripts)), "utf-8")
    bad.write_text(json.dumps(comparison(scripts, slower=2)), "utf-8")
    assert record.main([str(good), "--into", str(into)]) == 0 and not into.exists()
    assert "Nothing is recorded for this class of machine" in capsys.readouterr().out
    assert record.main([str(good), "--record", "--into", str(into)]) == 0
    kept = json.loads(into.read_text("utf-8"))["float32, AVX2, 2 cores"]["demo"]["trl_tuned"]
    assert kept["ratio"] == 10.0 and kept["range"] == [10.0, 10.0] and kept["rounds"] == 2
    assert record.main([str(good), "--into", str(into)]) == 0
    assert record.main([str(bad), "--into", str(into)]) == 1
    assert json.loads(into.read_text("utf-8"))["float32, AVX2, 2 cores"]["demo"]["trl_tuned"] == kept


def test_the_record_of_this_repository_is_one(scripts):
    kept = json.loads(scripts["record"].RECORDED.read_text("utf-8"))
    for of_class in kept.values():
        assert set(of_class) <= set(scripts["rows"].DATA)
        for one in (one for data in of_class.values() for one in data.values()):
            assert one["range"][0] <= one["ratio"] * 1.01 and one["ratio"] <= one["range"][1] * 1.01 and one["date"]


def test_the_gain_is_split_arm_by_arm(scripts):
    runs = copy.deepcopy(comparison(scripts, arms=tuple(SPEEDS))["runs"])
    for run in runs:
        if run["arm"] == "luthier":
            run |= {"less_work_by_sharing": 5.0, "less_work_by_logits": 1.5}
    told = scripts["gain"].split(runs)
    chain = ["trl_tuned / trl_default", "plain / trl_tuned", "unshared / plain", "luthier / unshared"]
    product = 1.0
    for pair in chain:
        product *= told[pair]["median"]
        assert told[pair]["low"] <= told[pair]["median"] <= told[pair]["high"]
    assert product == pytest.approx(10.5 / 0.1, rel=0.01), "the parts multiply to the whole"
    assert told["work"] == {"sharing": 5.0, "logits": 1.5, "kept_of_sharing": pytest.approx(4.2 / 5)}
    assert scripts["gain"].split(comparison(scripts, arms=("luthier",))["runs"]) == {}


def test_a_split_is_told_in_words(scripts, capsys):
    scripts["gain"].print_split("demo", comparison(scripts, arms=("unshared", "luthier"))["runs"])
    assert "luthier / unshared: 4.2 times (4.0 to 4.4): sharing" in capsys.readouterr().out
    scripts["gain"].print_split("demo", comparison(scripts, arms=("luthier",))["runs"])
    assert "needs runs of two neighbouring arms" in capsys.readouterr().out


def test_only_figures_of_an_undivided_machine_are_drawn(scripts, tmp_path):
    plots = scripts["plots"]
    (tmp_path / "a.json").write_text(json.dumps(comparison(scripts)), "utf-8")
    divided = {**comparison(scripts), "machine": {**MACHINE, "threads": 1}}
    (tmp_path / "b.json").write_text(json.dumps(divided), "utf-8")
    (tmp_path / "c.json").write_text(json.dumps([1, 2]), "utf-8")
    (only,) = plots.comparisons(tmp_path)
    assert plots.bars(only) == {"trl_tuned": (10.0, 10.0, 10.0)}


def test_a_picture_is_drawn(scripts, tmp_path):
    pytest.importorskip("matplotlib")
    scripts["plots"].draw([comparison(scripts, arms=tuple(SPEEDS))], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.data
@pytest.mark.parametrize("name", ["snips_nlu", "banking77", "lamini_docs", "e2e_nlg"])
def test_data_sets_become_conversations(scripts, name):
    rows = scripts["rows"]
    if not rows.there(name):
        pytest.skip(f"{name} is not on this machine")
    made = rows.rows_of(name)
    assert len(made) > 1000
    assert all([turn["role"] for turn in turns][-2:] == ["user", "assistant"] for turns in made)
    assert all(turns[-1]["content"].strip() for turns in made)
    if name == "banking77":
        labels = {turns[-1]["content"] for turns in made}
        assert len(labels) == 77 and all(label in made[0][0]["content"] for label in labels)
