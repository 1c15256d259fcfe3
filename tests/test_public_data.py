"""Real data sets as people publish them: each is read, or refused with what to write. The outcomes are pinned."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.data.check import CheckReport, check
from luthier.data.read import Dataset, read
from luthier.data.split import guard, split, without_leaks
from luthier.errors import DataError

FOLDER = Path(__file__).parents[2] / "shared" / "data"
pytestmark = [pytest.mark.data, pytest.mark.skipif(not FOLDER.is_dir(), reason="the public data sets are not here")]

SMS, LAMINI = FOLDER / "sms_spam" / "spam.csv", FOLDER / "lamini_docs" / "lamini_docs.jsonl"
PLAYMUSIC = FOLDER / "snips_nlu" / "PlayMusic" / "train_PlayMusic_full.json"


def medical() -> Path:
    (path,) = (FOLDER / "cmedical_dialogue").glob("*.csv")
    return path


def refusal(*paths: Path, **settings: object) -> DataError:
    with pytest.raises(DataError) as caught:
        read(list(paths), **settings)  # type: ignore[arg-type]
    return caught.value


def halves(data: Dataset) -> CheckReport:
    found = split(data.examples, dev=0.15, test=0.15, seed=0)
    return check({"train": found.train, "dev": found.dev, "test": found.test}, files=data.files, faults=data.faults)


def test_sms_spam_is_refused_until_its_columns_are_named() -> None:
    error = refusal(SMS)
    assert len(error.faults) == 51, "the layout, and the 50 rows that spill into unnamed columns"
    assert "{columns: {prompt: v2, answer: v1}}" in error.faults[0].remedy
    assert error.faults[1].where.endswith("spam.csv:97")
    assert "{columns: {prompt: v2, answer: v1}, on_bad: skip}" in error.faults[1].remedy


def test_sms_spam_reads_with_what_the_error_says() -> None:
    columns = {"prompt": "v2", "answer": "v1"}
    assert len(refusal(SMS, columns=columns).faults) == 50
    data = read([SMS], columns=columns, on_bad="skip")
    assert (data.files[0].encoding, data.files[0].rows, data.files[0].skipped) == ("cp1252", 5522, 50)
    assert {row.answer for row in data.examples} == {"ham", "spam"}
    assert any("£" in row.question for row in data.examples)
    report = halves(data)
    assert report.faults == [] and {"skipped", "majority_answer", "duplicate", "encoding"} <= {
        finding.code for finding in report.findings
    }


def test_snips_is_refused_with_the_row_to_write_and_its_broken_line() -> None:
    error = refusal(PLAYMUSIC)
    assert 'a row is {"data": [{"text": ...}, ...]}, with no text of its own' in error.faults[0].what
    assert '{"prompt": "...", "answer": "..."}' in error.faults[0].remedy
    # published as latin-1, the file is UTF-8 but for one line that holds an emoji as two surrogates
    assert error.faults[1].where.endswith("train_PlayMusic_full.json:9091") and "0xed" in error.faults[1].what


def test_every_snips_file_is_refused_in_one_go() -> None:
    paths = sorted((FOLDER / "snips_nlu").glob("*/train_*.json"))
    error = refusal(*paths)
    assert sum("no text of its own" in fault.what for fault in error.faults) == len(paths) == 14


def test_lamini_docs_reads_and_the_check_names_its_template_and_its_leaks() -> None:
    data = read([LAMINI])
    assert len(data.examples) == 1400 and data.files[0].format == "qa (prompt = question, answer)"
    report = halves(data)
    found = {finding.code: finding for finding in report.findings}
    assert found["template_inside"].count == 1400 and "template: raw" in found["template_inside"].remedy
    assert found["empty_answer"].origins == ("lamini_docs.jsonl:424",)
    assert found["same_answer"].count == 120, "a split by row would put these on both sides"
    assert report.faults == [], "luthier's split leaves no leak"


def test_a_split_of_lamini_docs_by_row_leaks_and_is_caught() -> None:
    rows = read([LAMINI]).examples
    report = check({"train": rows[:1100], "dev": rows[1100:1250], "test": rows[1250:]})
    leak = next(finding for finding in report.findings if finding.code == "leak")
    assert leak.severity == "fault" and leak.count > 50


def test_medical_dialogue_is_chinese_in_gb18030_and_asks_which_column() -> None:
    error = refusal(medical())
    assert "which column is the question? (department, title, ask, answer)" in error.faults[0].what
    assert "{columns: {prompt: ask, answer: answer}}" in error.faults[0].remedy
    data = read([medical()], columns={"prompt": "ask", "answer": "answer"}, tags=["department"])
    assert (data.files[0].encoding, data.files[0].rows) == ("gb18030", 7644)
    assert data.examples[0].answer.startswith("高血压病人可以口服党参的。")
    assert data.examples[0].tags == {"department": "心血管科"}
    report = halves(data)
    assert report.faults == [] and report.sides["test"]["scripts"]["Han"] > 0.98


def test_a_published_leak_is_found(tmp_path: Path) -> None:
    parts = {}
    for side in ("train", "dev", "test"):
        path = FOLDER / "scibert_citation" / "citation_intent" / f"{side}.txt"
        assert "name the file .jsonl" in str(refusal(path))
        named = tmp_path / f"{side}.jsonl"
        named.write_bytes(path.read_bytes())
        parts[side] = read([named], columns={"prompt": "text", "answer": "label"}).examples
    leaks = guard(parts["train"], parts["dev"], parts["test"])
    assert len({leak.held.question for leak in leaks if (leak.side, leak.kind) == ("test", "same")}) >= 45
    clean = without_leaks(parts["train"], leaks)
    assert 0 < len(clean) < len(parts["train"])
    assert guard(clean, parts["dev"], parts["test"]) == []


OTHERS = [
    ("banking77/train.csv", {"columns": {"prompt": "text", "answer": "category"}}, 10003),
    ("e2e_nlg/devset.csv", {"columns": {"prompt": "mr", "answer": "ref"}}, 4672),
    ("gsm8k/train.jsonl", {}, 7473),
    ("llamafactory_demos/alpaca_en_demo.json", {}, 999),
    ("llamafactory_demos/alpaca_zh_demo.json", {}, 1000),
    ("llamafactory_demos/identity.json", {}, 91),
    ("llamafactory_demos/glaive_toolcall_en_demo.json", {}, 300),
    ("llamafactory_demos/reason_tool_use_demo_50.jsonl", {}, 50),
    ("llamafactory_demos/v1_sft_demo.jsonl", {}, 500),
    ("llamafactory_demos/c4_demo.jsonl", {}, 300),
    ("preference_demos/dpo_en_demo.json", {}, 300),
    ("preference_demos/dpo_zh_demo.json", {}, 300),
    ("preference_demos/v1_dpo_demo.jsonl", {}, 10),
    ("fewclue/tnews/train_0.json", {"columns": {"prompt": "sentence", "answer": "label_desc"}}, 240),
]


@pytest.mark.parametrize(("name", "settings", "rows"), OTHERS)
def test_other_public_files_read_without_a_fault(name: str, settings: dict[str, object], rows: int) -> None:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    data = read([path], **settings)  # type: ignore[arg-type]
    assert (len(data.examples), data.faults) == (rows, [])


def test_good_and_bad_answers_are_not_learned_alike() -> None:
    assert "good or bad" in str(refusal(FOLDER / "preference_demos" / "kto_en_demo.json"))
