"""The check names what would spoil a training run, where it stands, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.data.check import CheckReport, Finding, check
from luthier.data.profile import Lengths, instruction_share, profile, spread
from luthier.data.read import read
from luthier.records import Example, Message, Origin


def example(question: str, answer: str, line: int = 1, system: str = "") -> Example:
    head = (Message("system", system),) if system else ()
    return Example((*head, Message("user", question), Message("assistant", answer)), Origin("rows.jsonl", line))


def some(count: int = 12) -> list[Example]:
    names = [
        "anchor",
        "beetle",
        "canyon",
        "dahlia",
        "ember",
        "falcon",
        "glacier",
        "harbour",
        "island",
        "jasmine",
        "kettle",
        "lantern",
    ]
    return [example(f"{names[n % 12]} {n * 7919}", f"{names[(n * 5) % 12]} {n}", n + 1) for n in range(count)]


def only(report: CheckReport, code: str) -> Finding:
    (found,) = [finding for finding in report.findings if finding.code == code]
    assert found.remedy
    return found


def codes(report: CheckReport) -> set[str]:
    return {finding.code for finding in report.findings}


def test_clean_rows_have_no_faults() -> None:
    report = check({"train": some(), "dev": [example("other thing", "b")], "test": [example("third", "c")]})
    assert report.faults == [] and codes(report) == {"few_test"}
    assert report.as_dict()["ok"] is True


def test_the_record_is_json_with_stable_keys() -> None:
    record = json.loads(json.dumps(check({"train": some()}).as_dict()))
    assert list(record) == ["ok", "files", "sides", "findings", "bad_rows"]
    assert {"rows", "tokens", "characters", "answers", "instruction_share", "scripts"} <= record["sides"][
        "train"
    ].keys()
    finding = json.loads(json.dumps(check({"train": [], "dev": [], "test": []}).as_dict()))["findings"][0]
    assert list(finding) == ["severity", "code", "what", "count", "origins", "groups", "remedy"]


def test_repeated_and_contradicting_rows_are_grouped_by_origin() -> None:
    rows = [
        *some(),
        example("Same  question", "yes", 21),
        example("same question", "YES", 22),
        example("same question", "no", 23),
    ]
    report = check({"train": rows})
    assert only(report, "duplicate").groups == (("rows.jsonl:21", "rows.jsonl:22"),)
    found = only(report, "contradiction")
    assert found.groups == (("rows.jsonl:21", "rows.jsonl:22", "rows.jsonl:23"),) and found.count == 3


def test_one_question_under_two_instructions_is_no_contradiction() -> None:
    rows = [example("x", "yes", 1, "answer in English"), example("x", "oui", 2, "answer in French")]
    assert "contradiction" not in codes(check({"train": rows}))


def test_near_rows_are_named_with_their_clusters() -> None:
    rows = [
        *some(),
        example("please mend the blue shoes by friday", "a", 31),
        example("please mend the blue shoes by friday!", "b", 32),
    ]
    assert only(check({"train": rows}), "near_duplicate").groups == (("rows.jsonl:31", "rows.jsonl:32"),)


def test_leaks_are_faults_that_name_both_rows() -> None:
    rows = some()
    report = check({"train": rows, "dev": [], "test": [example(rows[3].question, "z", 77)]})
    found = only(report, "leak")
    assert found.severity == "fault" and "rows.jsonl:4 asks the same as test row rows.jsonl:77" in found.origins[0]
    assert report.faults and not report.as_dict()["ok"]


@pytest.mark.parametrize(
    ("truncate", "severity", "words"),
    [
        ("error", "fault", "are longer than 100 tokens"),
        ("left", "warning", "lose the beginning of their prompt (70 tokens in all)"),
        ("right", "warning", "lose the end of their prompt (70 tokens in all)"),
        ("drop", "warning", "are left out"),
    ],
)
def test_over_long_rows_are_listed_with_what_is_cut(truncate: str, severity: str, words: str) -> None:
    rows = some()
    lengths = {row.id: Lengths(10, 5) for row in rows} | {rows[2].id: Lengths(90, 30), rows[5].id: Lengths(145, 5)}
    report = check({"train": rows}, lengths=lengths, limit=100, truncate=truncate)
    found = only(report, "over_long")
    assert (found.severity, found.count) == (severity, 2) and words in found.what
    assert found.origins[0] == "rows.jsonl:6 (145 + 5 tokens, 50 too many)"
    assert report.sides["train"]["tokens"]["total"]["max"] == 150


def test_an_answer_is_never_cut() -> None:
    rows = some()
    lengths = {row.id: Lengths(10, 5) for row in rows} | {rows[0].id: Lengths(10, 120)}
    report = check({"train": rows}, lengths=lengths, limit=100, truncate="left")
    assert only(report, "answer_over_long").severity == "fault"


def test_a_template_inside_the_data_has_a_remedy_that_works() -> None:
    rows = [example(f"### Question:\n{row.question}\n\n### Answer:", row.answer) for row in some()]
    found = only(check({"train": rows}, template="plain"), "template_inside")
    assert found.severity == "warning" and "`template: raw`" in found.remedy and found.count == 12
    raw = [f for f in check({"train": rows}, template="raw").findings if f.code == "template_inside"]
    assert [finding.severity for finding in raw] == ["note"]
    mixed = check({"train": [*some(), rows[0]]})
    assert only(mixed, "template_residue").count == 1


def test_control_tokens_and_empty_answers_are_named() -> None:
    rows = [*some(), example("a <|eot|> b", "x", 40), example("silent", " ", 41)]
    report = check({"train": rows}, special=["<|eot|>", "<pad>"])
    assert only(report, "control_token").origins == ("rows.jsonl:40",)
    assert only(report, "empty_answer").origins == ("rows.jsonl:41",)
    call = Example((Message("user", "q"), Message("assistant", "", None, {"tool_calls": [{}]})), Origin("r", 1))
    assert "empty_answer" not in codes(check({"train": [call]}))


def test_the_majority_answer_and_its_share() -> None:
    rows = [example(f"message {n * 7919}", "ham" if n % 10 else "spam") for n in range(40)]
    report = check({"train": rows})
    assert "90% of the train answers are 'ham'" in only(report, "majority_answer").what
    assert report.sides["train"]["answers"]["top"][0] == {"answer": "ham", "rows": 36, "share": 0.9}


def test_reworded_questions_with_one_long_answer() -> None:
    prose = "You can bring it to the shop on any weekday between nine and five o'clock, without an appointment."
    others = [example(row.question, f"{prose} Ask for number {row.question}.") for row in some()]
    rows = [*others, example("when can I come", prose, 51), example("opening hours please", prose, 52)]
    assert only(check({"all": rows}), "same_answer").groups == (("rows.jsonl:51", "rows.jsonl:52"),)


def test_sides_in_different_scripts() -> None:
    assert (
        "train in Latin, test in Han"
        in only(check({"train": some(), "test": [example("高血压", "党参")]}), "scripts").what
    )


def test_missing_sides_and_quarantine() -> None:
    report = check({"train": [], "dev": [], "test": some()}, quarantined=some(2))
    assert {"no_train", "no_dev", "few_test", "quarantined"} <= codes(report)
    assert [fault.what for fault in report.faults] == ["there are no train rows"]


def test_a_giant_chain_is_warned_of() -> None:
    rows = [example(f"please mend the blue shoes number {n} by friday", "x", n) for n in range(80)]
    assert only(check({"train": rows}), "giant_cluster").count == 80


def test_a_dataset_brings_its_files_and_skipped_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer,mood\n" + "Größe?,Fünf,gut\n".encode("cp1252") * 3 + b"x\n")
    report = check(read([path], on_bad="skip"))
    assert {"skipped", "unused_columns", "encoding"} <= codes(report)
    assert only(report, "skipped").severity == "warning" and "1 of 4 rows" in only(report, "skipped").what
    assert report.as_dict()["files"][0]["encoding"] == "latin-1"
    assert report.as_dict()["bad_rows"][0]["where"].endswith("a.csv:5")


def test_spread_uses_values_that_occur() -> None:
    assert spread(range(1, 101)) == {"min": 1, "median": 50, "p90": 90, "p99": 99, "max": 100}
    assert spread([7]) == {"min": 7, "median": 7, "p90": 7, "p99": 7, "max": 7}
    assert spread([]) is None


def test_the_instruction_is_counted_wherever_it_stands() -> None:
    head = "You are a clerk. Turn this message into JSON: "
    as_system = [example(f"{n * 7919} x", "y", system=head) for n in range(30)]
    inside = [example(f"{head}{n * 7919} x", "y") for n in range(30)]
    assert 0.75 < instruction_share(inside) <= instruction_share(as_system) < 0.95
    assert instruction_share(some()) == 0 == instruction_share([])


def test_a_profile_of_nothing_is_empty_and_not_an_error() -> None:
    assert profile([])["rows"] == 0 and profile([])["tokens"] is None
