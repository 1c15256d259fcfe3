"""Streams: every epoch a permutation, and a restored stream goes on as the unbroken one would have."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.stream import Stream
from luthier.errors import DataError


def lines(first: int, count: int, bad: bool = False) -> str:
    rows = [json.dumps({"question": f"q{n}", "answer": f"a{n}"}) for n in range(first, first + count)]
    if bad:
        rows.insert(count // 2, "nonsense")
        rows.append("[]")
        rows.insert(0, '{"question": null, "answer": "a"}')
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    (folder / "one.jsonl").write_text(lines(0, 23), encoding="utf-8")
    (folder / "two.jsonl.gz").write_bytes(gzip.compress(lines(23, 17).encode()))
    rows = [json.loads(line) for line in lines(40, 11).splitlines()]
    table = 'question,answer\n"q\nnew line",a-1\n' + "".join(f"{row['question']},{row['answer']}\n" for row in rows)
    (folder / "three.csv").write_text(table, encoding="utf-8")
    (folder / "four.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "bad.jsonl").write_text(lines(60, 20, bad=True), encoding="utf-8")
    return folder


FILES = ("one.jsonl", "two.jsonl.gz", "three.csv", "four.json", "bad.jsonl")
ROWS = 23 + 17 + 12 + 11 + 20


def open_all(folder: Path, buffer: int, seed: int = 0) -> Stream:
    return Stream([folder / name for name in FILES], on_bad="skip", buffer=buffer, seed=seed)


@pytest.mark.parametrize("buffer", [1, 7, 50, 1000])
def test_every_epoch_gives_each_row_once_in_its_own_order(folder: Path, buffer: int) -> None:
    stream = open_all(folder, buffer)
    epochs = [[f"{e.origin} {e.answer}" for e in islice(stream, ROWS)] for _ in range(3)]
    assert all(len(set(epoch)) == ROWS for epoch in epochs)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len({tuple(epoch) for epoch in epochs}) == 3 and stream.epoch == 2
    assert stream.skipped == 9, "three bad rows, counted as often as they were read"


def test_the_buffer_shuffles_and_the_seed_decides(folder: Path) -> None:
    orders = [[e.answer for e in islice(Stream([folder / "one.jsonl"], buffer=100, seed=s), 23)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0], key=lambda answer: int(answer[1:]))


@given(buffer=st.integers(1, 60), taken=st.integers(0, 3 * ROWS), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_restored_stream_goes_on_identically(folder: Path, buffer: int, taken: int, seed: int) -> None:
    unbroken = open_all(folder, buffer, seed)
    for _ in range(taken):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.state()))
    restored = open_all(folder, buffer, seed)
    restored.restore(state)
    assert restored.state() == state
    for _ in range(2 * ROWS):
        one, other = next(unbroken), next(restored)
        assert (one, one.origin) == (other, other.origin)
    assert restored.state() == unbroken.state()
    assert restored.skipped == unbroken.skipped


def test_going_back_repeats_the_same_rows(folder: Path) -> None:
    stream = open_all(folder, 10)
    begin = stream.state()
    first = [e.id for e in islice(stream, 30)]
    stream.restore(begin)
    assert [e.id for e in islice(iter(stream), 30)] == first


def test_a_bad_row_ends_a_strict_stream_with_its_line(folder: Path) -> None:
    with pytest.raises(DataError, match=r"bad.jsonl:1: 'question' must be a text"):
        next(Stream([folder / "bad.jsonl"], buffer=5))


def test_a_file_that_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(0, 5), encoding="utf-8")
    stream = Stream([path], buffer=2)
    next(stream)
    state = stream.state()
    path.write_text(lines(1, 5), encoding="utf-8")
    with pytest.raises(DataError, match=r"is not the file that the stream was reading: .*rows.jsonl"):
        Stream([path], buffer=2).restore(state)


@pytest.mark.parametrize(
    ("text", "what"), [("", "no rows"), ("nonsense\n", "no rows"), ('{"a": "x"}\n', "no known layout")]
)
def test_files_without_rows_do_not_spin_for_ever(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=what):
        next(Stream([path], buffer=2, on_bad="skip"))


def test_the_state_is_small_and_holds_no_text(folder: Path) -> None:
    stream = open_all(folder, 20)
    answers = Counter(next(stream).answer for _ in range(5))
    text = json.dumps(stream.state())
    assert len(text) < 2000 and not any(f'"{answer}"' in text for answer in answers)
