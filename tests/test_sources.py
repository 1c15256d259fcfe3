"""Files of every kind, honest and hostile: each bad row is a fault with its line, and nothing else is lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import registry
from luthier.data.encoding import detect
from luthier.data.read import read, source_for
from luthier.errors import DataError, Fault, UsageError
from luthier.records import Row

ROWS = [
    {"question": "Where is my order?", "answer": "On its way, madam."},
    {"question": 'He said "now",\nthen left', "answer": "naïve café ✓"},
    {"question": "高血压患者能吃党参吗？", "answer": "可以口服党参。"},
]


def write(path: Path, rows: list[dict[str, str]], encoding: str = "utf-8") -> Path:
    """Write rows in the kind of file that the name asks for."""
    text = ""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("jsonl", "ndjson"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == "json":
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    elif kind in ("csv", "tsv"):
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        table.writeheader()
        table.writerows(rows)
        text = out.getvalue()
    else:
        buffer = io.BytesIO()
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), buffer, row_group_size=2)
        data = buffer.getvalue()
    data = data if kind == "parquet" else text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


KINDS = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet"]


@pytest.mark.parametrize("name", KINDS + [name + ".gz" for name in KINDS])
def test_every_kind_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    data = read([write(tmp_path / name, ROWS)])
    assert [(e.question, e.answer) for e in data.examples] == [(r["question"], r["answer"]) for r in ROWS]
    assert data.hash == read([write(tmp_path / "other.jsonl", ROWS)]).hash
    assert data.files[0].rows == 3 and data.files[0].format == "qa (prompt = question, answer)"


@pytest.mark.parametrize("name", [*KINDS, "a.jsonl.gz", "a.csv.gz", "a.parquet.gz"])
def test_reading_goes_on_from_any_cursor(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS * 3)
    source = source_for(path)
    rows = [row for row in source.rows(path) if isinstance(row, Row)]
    assert len(rows) == 9
    for index, row in enumerate(rows):
        again = list(source.rows(path, start=row.cursor))
        assert again == rows[index + 1 :], f"from row {index}"


@pytest.mark.parametrize("shelf_name", registry.names("sources"))
def test_every_source_declares_its_suffixes(shelf_name: str) -> None:
    source = registry.make("sources", shelf_name)
    assert source.suffixes and all(suffix.startswith(".") and suffix.islower() for suffix in source.suffixes)


# ---- encodings ----------------------------------------------------------------------------------------------------
GERMAN = [{"question": "Größe der Straße?", "answer": "Fünf Meter, mein Lieber – so ist’s."}] * 5
CHINESE = [{"question": "高血压患者能吃党参吗？请问医生", "answer": "高血压病人可以口服党参的，请注意休息。"}] * 5


@pytest.mark.parametrize(
    ("encoding", "rows", "named"),
    [
        ("utf-8", CHINESE, "utf-8"),
        ("utf-8-sig", CHINESE, "utf-8-sig"),
        ("utf-16", CHINESE, "utf-16"),
        ("utf-16-le", GERMAN, "utf-16-le"),
        ("gb18030", CHINESE, "gb18030"),
        ("cp1252", GERMAN, "cp1252"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.jsonl.gz"])
def test_encodings_are_detected_and_named(
    tmp_path: Path, encoding: str, rows: list[dict[str, str]], named: str, name: str
) -> None:
    data = read([write(tmp_path / name, rows, encoding)])
    assert data.files[0].encoding == named
    assert data.examples[-1].answer == rows[-1]["answer"]


ORDER = "please put this message of a customer into one of the classes: "


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (ORDER + "退货", "gb18030", "gb18030"),
        (ORDER + "café", "latin-1", "latin-1"),
        ("Что нужно есть при высоком давлении?", "cp1251", "cp1251"),
        ("高血壓患者可以吃黨參嗎？請問醫生。", "big5", "big5"),
        ("고혈압 환자는 무엇을 먹어야 합니까?", "euc-kr", "cp949"),
    ],
)
def test_few_foreign_letters_and_other_languages(tmp_path: Path, text: str, encoding: str, named: str) -> None:
    rows = [{"question": f"{text} {n}", "answer": "a"} for n in range(20)]
    data = read([write(tmp_path / "a.jsonl", rows, encoding)])
    assert data.files[0].encoding == named and data.examples[7].question == f"{text} 7"


def test_one_odd_byte_late_in_a_big_latin_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer\n" + b"plain text,plain answer\n" * 60_000 + b"caf\xe9,oui\n")
    assert detect(path) == "latin-1"
    assert read([path]).examples[-1].question == "café"


def test_a_utf8_file_with_one_broken_line_stays_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"question": "é", "answer": "ü"}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(good * 5 + good.replace("é".encode(), b"\xe9") + good)
    data = read([path], on_bad="skip")
    assert data.files[0].encoding == "utf-8" and data.files[0].rows == 6
    assert [fault.where for fault in data.faults] == [f"{data.files[0].path}:6"]
    assert "0xe9" in data.faults[0].what


@pytest.mark.parametrize(
    ("odd", "named"), [(b"caf\xe9", "latin-1"), (b"so it\x92s", "cp1252"), (b"\xed\xa0\xbc", "utf-8")]
)
def test_a_lone_odd_byte_is_western_unless_it_has_the_shape_of_utf8(tmp_path: Path, odd: bytes, named: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "p", "answer": "a"}\n{"prompt": "' + odd + b'", "answer": "a"}\n')
    assert read([path], on_bad="skip").files[0].encoding == named


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text encoding is called 'klingon'"):
        read([write(tmp_path / "a.csv", ROWS)], encoding="klingon")


# ---- hostile rows (reliability reference, R12) -----------------------------------------------------------------------
GOOD = '{"prompt": "p", "answer": "é"}'.encode()
HOSTILE = {
    "nul byte": b'{"prompt": "p\0", "answer": "a"}',
    "nul escaped": b'{"prompt": "p\\u0000", "answer": "a"}',
    "nul in answer": b'{"prompt": "p", "answer": "\\u0000"}',
    "10 MB line": b'{"prompt": "' + b"x" * 10_000_000 + b'", "answer": "a"}',
    "10 MB of nothing": b" " * 10_000_000 + b"x",
    "duplicate key": b'{"prompt": "p", "prompt": "q", "answer": "a"}',
    "duplicate key inside": b'{"prompt": "p", "answer": "a", "m": {"k": 1, "k": 2}}',
    "lone high surrogate": b'{"prompt": "\\ud83d", "answer": "a"}',
    "lone low surrogate": b'{"prompt": "p", "answer": "\\ude00x"}',
    "surrogates reversed": b'{"prompt": "\\ude00\\ud83d", "answer": "a"}',
    "surrogate bytes": b'{"prompt": "\xed\xa0\xbc", "answer": "a"}',
    "NaN": b'{"prompt": "p", "answer": NaN}',
    "Infinity": b'{"prompt": "p", "answer": Infinity}',
    "-Infinity": b'{"prompt": "p", "answer": "a", "x": -Infinity}',
    "huge float": b'{"prompt": "p", "answer": 1e999}',
    "huge integer": b'{"prompt": "p", "answer": ' + b"9" * 5000 + b"}",
    "depth 10,000 of lists": b'{"prompt": "p", "answer": "a", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "depth 10,000 of objects": b'{"x":' * 10_000 + b"1" + b"}" * 10_000,
    "depth 10,000 unclosed": b"[" * 10_000,
    "depth 300": b'{"prompt": "p", "answer": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}",
    "a list": b'["p", "a"]',
    "a text": b'"p"',
    "a number": b"42",
    "null": b"null",
    "true": b"true",
    "two objects": GOOD + b" " + GOOD,
    "objects without space": GOOD + GOOD,
    "breaks off": b'{"prompt": "p", "answer": "a',
    "breaks off at a key": b'{"prompt": "p", ',
    "single quotes": b"{'prompt': 'p', 'answer': 'a'}",
    "trailing comma": b'{"prompt": "p", "answer": "a",}',
    "bare words": b"hello world",
    "a comment": b'// {"prompt": "p"}',
    "bare control character": b'{"prompt": "p\x07", "answer": "a"}',
    "bare tab": b'{"prompt": "p\t", "answer": "a"}',
    "bad escape": b'{"prompt": "\\x41", "answer": "a"}',
    "bad utf-8": b'{"prompt": "\xff\xfe", "answer": "a"}',
    "overlong utf-8": b'{"prompt": "\xc0\xaf", "answer": "a"}',
    "cut utf-8": b'{"prompt": "\xe9\xab", "answer": "a"}',
    "prompt null": b'{"prompt": null, "answer": "a"}',
    "prompt missing": b'{"answer": "a"}',
    "answer missing": b'{"prompt": "p"}',
    "prompt an object": b'{"prompt": {"a": 1}, "answer": "a"}',
    "answer a list of texts": b'{"prompt": "p", "answer": ["a", "b"]}',
    "prompt empty": b'{"prompt": "  ", "answer": "a"}',
    "mistyped key": b'{"promt": "p", "answer": "a"}',
    "empty object": b"{}",
    "tools a text": b'{"prompt": "p", "answer": "a", "tools": "hammer"}',
    "tools with half a character": b'{"prompt": "p", "answer": "a", "tools": [{"name": "\\ud800"}]}',
    "bom in the middle": b'\xef\xbb\xbf{"prompt": "p", "answer": "a"}',
}


def test_there_are_fifty_hostile_files() -> None:
    assert len(HOSTILE) == 50


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_line_is_a_fault_with_its_line_and_costs_no_other(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", HOSTILE[name], GOOD, GOOD]) + b"\n")
    data = read([path], on_bad="skip")
    assert len(data.examples) == 3
    assert {fault.where for fault in data.faults} == {f"{data.files[0].path}:3"}, data.faults
    assert data.files[0].skipped == 1 and data.faults[0].what
    with pytest.raises(DataError) as caught:
        read([path])
    assert f"{data.files[0].path}:3: " in str(caught.value)
    assert len(str(caught.value)) < 3000


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz"])
def test_no_bytes_raise_anything_but_faults(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"noise{suffix}"
    path.write_bytes(data)
    try:
        read([path], on_bad="skip")
    except DataError as error:
        assert error.faults


def test_all_faults_of_all_files_come_in_one_error(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    one.write_bytes(GOOD + b"\nnonsense\n" + GOOD + b"\n[]\n")
    two.write_text('prompt,answer\np,a\n"p"q,a\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read([one, two, tmp_path / "onne.jsonl"])
    places = [fault.where.rpartition("/")[2] for fault in caught.value.faults]
    assert sorted(places) == ["one.jsonl:2", "one.jsonl:4", "onne.jsonl", "two.csv:3"]
    assert "did you mean 'one.jsonl'" in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_error_spells_out_two_hundred_faults_and_counts_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + b"nonsense\n" * 314)
    with pytest.raises(DataError) as caught:
        read([path])
    assert len(caught.value.faults) == 314
    assert str(caught.value).count(": is not JSON") == 200 and "and 114 more" in str(caught.value)


# ---- tables ----------------------------------------------------------------------------------------------------------
def rows_of(path: Path) -> list[Row | Fault]:
    return list(source_for(path).rows(path))


def test_crlf_and_quoted_line_ends_keep_the_right_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\r\none,1\r\n"two\r\nlines\r\nhere",2\r\n\r\nthree,3\r\nfour\r\nfive,5\r\n')
    found = rows_of(path)
    assert [(row.origin.line, row.value["a"]) for row in found if isinstance(row, Row)] == [
        (2, "1"),
        (3, "2"),
        (7, "3"),
        (9, "5"),
    ]
    assert [fault.where for fault in found if isinstance(fault, Fault)] == [f"{path}:8"]


def test_text_in_unnamed_columns_is_a_fault_that_says_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("v1,v2,,\nham,a long enough text,,\nspam,one, two, three\nham,x,,,,tail\n", encoding="utf-8")
    found = rows_of(path)
    assert [type(item) for item in found] == [Row, Fault, Fault]
    assert "('two')" in str(found[1]) and "('tail')" in str(found[2])
    assert "{columns: {prompt: v2, answer: v1}, on_bad: skip}" in str(found[1])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_tells_the_delimiter(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt{delimiter}answer\nx{delimiter}y\n", encoding="utf-8")
    assert rows_of(path)[0].value == {"prompt": "x", "answer": "y"}


def test_a_quote_that_is_never_closed_is_named_where_it_opens(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,a\nx,y\n"open,z\nmore,w\n', encoding="utf-8")
    found = rows_of(path)
    assert str(found[1]).startswith(f"{path}:3: the quote that opens here is never closed")


@pytest.mark.parametrize("text", ["", "\n", ",,\nx,y,z\n", "a,a\nx,y\n"])
def test_a_table_without_a_usable_header_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"header|twice"):
        read([path])


# ---- JSON --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        '[\n{"prompt": "a", "answer": "b"},\n{"prompt": "c", "answer": "d"}\n]',
        '{"version": 1, "note": ["x"], "rows": []}',
        '{"version": "1.0",\n"data": [{"prompt": "a", "answer": "b"},\n\n{"prompt": "c", "answer": "d"}]}',
        '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n',
    ],
)
def test_arrays_objects_around_one_array_and_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found = rows_of(path)
    if "rows" in text:
        assert found[0].value["version"] == 1  # no list of objects: it is a row itself
        return
    assert [row.value["prompt"] for row in found] == ["a", "c"]
    line_of_c = text[: text.index('{"prompt": "c"')].count("\n") + 1
    assert found[1].origin.line == line_of_c


def test_a_single_chat_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "utf-8")
    assert [e.answer for e in read([path]).examples] == ["y"]


def test_two_lists_in_an_object_are_ambiguous(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}', "utf-8")
    assert "which one holds the rows" in str(rows_of(path)[0])


def test_reading_an_array_goes_on_behind_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    bad = ['{"prompt": "x", "prompt": "y"}', '{"prompt" "x"}', "17", "[" * 5000 + "]" * 5000, '{"prompt": NaN}']
    rows = ['{"prompt": "p", "answer": "a"}']
    for one in bad:
        rows += [one, '{"prompt": "p", "answer": "a"}']
    path.write_text("[\n" + ",\n".join(rows) + "\n]", encoding="utf-8")
    data = read([path], on_bad="skip")
    assert len(data.examples) == 6
    assert [int(fault.where.rpartition(":")[2]) for fault in data.faults] == [3, 5, 7, 9, 11]


def test_an_array_that_breaks_off_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "p", "answer": "a"},\n{"prompt": "p", "ans', encoding="utf-8")
    found = rows_of(path)
    assert isinstance(found[0], Row) and "breaks off" in str(found[1]) and ":2:" in str(found[1])


# ---- other kinds and places --------------------------------------------------------------------------------------
def test_plain_text_is_one_document_a_block(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\nfirst line\r\nsecond\r\n\r\n\n另一个文档\n".encode())
    data = read([path])
    assert [(e.origin.line, e.answer) for e in data.examples] == [(2, "first line\nsecond"), (6, "另一个文档")]
    assert data.files[0].format == "text (text)" and data.examples[0].prompt == ()


def test_json_lines_under_a_text_name_are_not_taken_for_prose(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text('{"text": "x", "label": "y"}\n' * 3, encoding="utf-8")
    with pytest.raises(DataError, match=r"a.txt:1: holds JSON Lines, not plain text -> name the file .jsonl"):
        read([path])


def test_a_damaged_gzip_names_the_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", ROWS * 2000)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="damaged"):
        read([path])


def test_a_folder_is_refused_with_the_lines_to_write(tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        write(tmp_path / name, ROWS)
    with pytest.raises(DataError, match=r"data: \{train: .*train.jsonl, dev: .*valid.jsonl, test: .*test.jsonl\}"):
        read([tmp_path])


def test_an_unknown_kind_of_file_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"\.csv, \.json, \.jsonl"):
        read([path])


def test_origins_tell_files_of_one_name_apart(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "rows.jsonl", ROWS[:1]))
    assert [str(e.origin) for e in read(paths).examples] == ["a/rows.jsonl:1", "b/rows.jsonl:1"]
    assert str(read(paths[:1]).examples[0].origin) == "rows.jsonl:1"
