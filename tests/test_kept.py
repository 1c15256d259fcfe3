"""Rows kept on disk: what is read is what was rendered, once for all starts, and never a half or a stale one."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import registry, spec, store
from luthier.contracts import Template
from luthier.errors import DataError
from luthier.flows import prepare as flow
from luthier.records import Example, Message, Origin, Rendered
from luthier.text import kept
from luthier.text.kept import Kept, Writer, key_of, prune, render_kept
from luthier.text.render import Rendering, render_all
from luthier.text.tokenizer import Tokenizer
from luthier.training.feed import ShuffledFeed


@functools.cache
def tokenizer(kind: str = "chatml") -> Tokenizer:
    return Tokenizer.from_folder(vocabularies.folder(kind))


@functools.cache
def template(name: str = "plain") -> Template:
    made: Template = registry.make("templates", name)
    return made


def examples(count: int = 30, *, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    words = ["shoe", "order", "blue", "refund", "broken", "zip", "tomorrow", "noon", "bag", "please"]
    return [
        Example(
            (
                Message("user", " ".join(draw.choices(words, k=draw.randint(2, 30)))),
                Message("assistant", f"answer {index}", draw.choice([None, 0.1, 2.5])),
            ),
            Origin("rows.jsonl", index + 1),
        )
        for index in range(count)
    ]


def kept_in(
    folder: Path, rows: list[Example], limit: int | None = None, truncate: str = "error", **more: Any
) -> Rendering:
    return render_kept(rows, template(), tokenizer(), limit, truncate, folder=folder, at_least=1, **more)


def places(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


class Counted:
    """How many rows were rendered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        monkeypatch.setattr(kept, "render_all", self)

    def __call__(self, rows: list[Example], *args: Any, **more: Any) -> Rendering:
        self.rows += len(rows)
        return render_all(rows, *args, **more)


WEIGHTS = st.floats(allow_nan=False, allow_infinity=False).map(lambda weight: weight or 0.0)
ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 1.0]) | WEIGHTS), min_size=1, max_size=20),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(made=ROWS, block=st.integers(1, 60), name=st.text(max_size=5, alphabet=st.characters(exclude_categories=["Cs"])))
def test_rows_come_back_bit_for_bit(tmp_path_factory: Any, made: list[Any], block: int, name: str) -> None:
    rows = [
        Rendered(tuple(i for i, _ in row), tuple(w for _, w in row), len(row) // 2, f"{name}{index}", cut=index)
        for index, row in enumerate(made)
    ]
    path = tmp_path_factory.mktemp("kept") / "rows.arrow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "BLOCK", block)
        with Writer(path) as file:
            for row in rows:
                file.append(row)
    found = Kept.open(path)
    assert list(found) == rows and [found[-1 - i] for i in range(len(rows))] == rows[::-1]
    assert [type(value) for row in found for value in (*row.ids, *row.weights)] == [
        type(value) for row in rows for value in (*row.ids, *row.weights)
    ]
    for span in (slice(3, 9), slice(None, -2), slice(5, None, 3), slice(None, None, -1)):
        assert list(found[span]) == rows[span] and list(found[span][1:]) == rows[span][1:]
    with pytest.raises(IndexError):
        found[len(rows)]


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@pytest.mark.parametrize(("limit", "truncate"), [(None, "error"), (24, "drop"), (24, "left"), (24, "right")])
def test_what_is_kept_is_what_is_rendered(tmp_path: Path, kind: str, limit: int | None, truncate: str) -> None:
    rows = examples(60)
    asked = (rows, template(), tokenizer(kind), limit, truncate)
    plain = render_all(*asked, skip=True)
    for _ in range(2):  # written, then read
        found = render_kept(*asked, skip=True, folder=tmp_path, at_least=1)
        assert isinstance(found.rendered, Kept)
        assert replace(found, rendered=list(found.rendered)) == plain
    assert len(places(tmp_path)) == 1
    assert limit is None or plain.dropped or plain.cut


def test_rows_are_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    for _ in range(3):
        kept_in(tmp_path, examples())
    assert counted.rows == 30


def test_few_rows_stay_in_memory(tmp_path: Path) -> None:
    found = render_kept(examples(), template(), tokenizer(), folder=tmp_path)
    assert isinstance(found.rendered, list) and len(found.rendered) == 30 and not places(tmp_path)


def test_the_key_is_all_that_decides_a_token(tmp_path: Path) -> None:
    rows = examples(6)
    *before, last = rows
    other, heavier = (
        [*before, replace(last, messages=(last.messages[0], answer))]
        for answer in (Message("assistant", "another"), replace(last.messages[1], weight=3))
    )
    elsewhere = [replace(row, origin=Origin("moved.jsonl", 9)) for row in rows]
    base = (rows, template(), tokenizer(), 99, "left")
    changed = [
        (other, *base[1:]),
        (heavier, *base[1:]),
        (rows[::-1], *base[1:]),
        (rows[:-1], *base[1:]),
        (rows, template("chat"), *base[2:]),
        (rows, registry.make("templates", {"name": "raw"}), *base[2:]),
        (rows, registry.make("templates", {"name": "raw", "separator": " "}), *base[2:]),
        (rows, template(), tokenizer("gemma"), 99, "left"),
        (*base[:3], 98, "left"),
        (*base[:3], 99, "right"),
        (*base[:3], None, "left"),
    ]
    keys = [key_of(*one) for one in (base, *changed)] + [key_of(*base, skip=True)]
    assert len(set(keys)) == len(keys)
    assert key_of(elsewhere, *base[1:]) == keys[0], "where a row stands changes nothing"
    assert key_of(*base[:3], None, "left") == key_of(*base[:3], None, "right"), "without a limit nothing is cut"


def test_faults_are_the_same_and_leave_nothing(tmp_path: Path) -> None:
    rows = [*examples(4), Example((Message("user", "q"), Message("assistant", "")), Origin("rows.jsonl", 99))]
    with pytest.raises(DataError) as plain:
        render_all(rows, template(), tokenizer(), 12)
    with pytest.raises(DataError) as found:
        kept_in(tmp_path, rows, 12)
    assert found.value.faults == plain.value.faults and str(found.value) == str(plain.value)
    assert not places(tmp_path)


def test_refused_rows_are_told_at_their_present_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    rows = [Example((Message("user", "q"), Message("assistant", "")), Origin("a.jsonl", 3)), *examples(4)]
    told = kept_in(tmp_path, rows, skip=True)
    assert [fault.where for _, fault in told.refused] == ["a.jsonl:3"] and len(told.rendered) == 4
    moved = [replace(row, origin=Origin("b.jsonl", 5 + index)) for index, row in enumerate(rows)]
    again = kept_in(tmp_path, moved, skip=True)
    assert [fault.where for _, fault in again.refused] == ["b.jsonl:5"] and again.refused[0][0] is moved[0]
    assert counted.rows == 5


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a bit": lambda place: _flip(place / kept.ROWS),
    "a truncated file": lambda place: os.truncate(place / kept.ROWS, 100),
    "a missing file": lambda place: (place / kept.ROWS).unlink(),
    "a missing outcome": lambda place: (place / kept.OUTCOME).unlink(),
    "no manifest": lambda place: (place / store.MANIFEST).unlink(),
    "a broken manifest": lambda place: (place / store.MANIFEST).write_text("{"),
    "nothing in it": lambda place: [path.unlink() for path in place.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_made_again_with_a_remark(tmp_path: Path, damage: Any) -> None:
    rows = examples()
    whole = list(kept_in(tmp_path, rows).rendered)
    damage(places(tmp_path)[0])
    found = kept_in(tmp_path, rows)
    assert list(found.rendered) == whole and "damaged" in found.remarks[0]
    assert not kept_in(tmp_path, rows).remarks


def test_a_sealed_folder_of_other_rows_is_not_believed(tmp_path: Path) -> None:
    rows = examples()
    whole = list(kept_in(tmp_path, rows).rendered)
    place = places(tmp_path)[0]

    def fill(staging: Path) -> None:
        with Writer(staging / kept.ROWS) as file:
            file.append(whole[0])
        store.write_json(staging / kept.OUTCOME, store.read_json(place / kept.OUTCOME))

    store.publish_folder(place, fill)
    found = kept_in(tmp_path, rows)
    assert list(found.rendered) == whole and "another number" in found.remarks[0]


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    code = f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_kept as t
        from luthier.text import kept
        kept.BLOCK = 50
        flush, count = kept.Writer._flush, 0
        def killing(self):
            global count
            flush(self)
            count += 1
            if count == 3:
                os.kill(os.getpid(), 9)
        kept.Writer._flush = killing
        t.kept_in(Path({str(tmp_path)!r}), t.examples())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (left,) = places(tmp_path)
    assert left.name.startswith(store.STAGING) and list(left.iterdir())
    found = kept_in(tmp_path, examples())
    assert list(found.rendered) == render_all(examples(), template(), tokenizer()).rendered and not found.remarks
    assert left in places(tmp_path), "it may be another process's that is still writing"
    os.utime(left, (0, time.time() - 2 * kept.ABANDONED))
    prune(tmp_path)
    assert left not in places(tmp_path) and len(places(tmp_path)) == 1


def test_the_oldest_go_when_there_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [examples(seed=seed) for seed in range(4)]
    keys = [key_of(rows, template(), tokenizer(), None, "error") for rows in used]
    for age, rows in enumerate(used[:3]):
        kept_in(tmp_path, rows)
        os.utime(tmp_path / keys[age], (0, 1000 + age))
    size = sum(path.stat().st_size for path in (tmp_path / keys[1]).iterdir())
    reading = kept_in(tmp_path, used[0]).rendered  # used just now
    monkeypatch.setattr(prune, "__kwdefaults__", {"spare": None, "limit": 3 * size + size // 2})
    kept_in(tmp_path, used[3])
    assert {path.name for path in places(tmp_path)} == {keys[0], keys[2], keys[3]}
    assert prune(tmp_path, spare=tmp_path / keys[3], limit=0) == [tmp_path / keys[2], tmp_path / keys[0]]
    assert list(reading) == render_all(used[0], template(), tokenizer()).rendered, "a mapped file outlives its name"


def test_a_cache_that_cannot_be_written_costs_a_remark(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    found = kept_in(blocked / "tokens", examples())
    assert found.rendered == render_all(examples(), template(), tokenizer()).rendered
    assert "stay in memory" in found.remarks[0]


def test_a_feed_makes_only_the_rows_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = kept_in(tmp_path, examples(100)).rendered
    made, plain = [], kept._Blocks.row

    def counting(self: Any, number: int) -> Rendered:
        made.append(number)
        return plain(self, number)

    monkeypatch.setattr(kept._Blocks, "row", counting)
    feed = ShuffledFeed(rows, batch_size=8, seed=0, epochs=1, budget=512)
    assert len(made) == 1, "one row proves that something is supervised"
    for _ in range(3):
        made.clear()
        batch = next(feed)
        assert len(made) == batch.examples == 8
    in_memory = ShuffledFeed(list(rows), batch_size=8, seed=0, epochs=1, budget=512)
    for step in range(feed.total_steps):
        ours, theirs = feed.batch(step).packs, in_memory.batch(step).packs
        assert [pack.rows for pack in ours] == [pack.rows for pack in theirs]
        assert all((a.ids == b.ids).all() for a, b in zip(ours, theirs, strict=True))


def test_a_task_prepared_twice_is_tokenised_once_and_feeds_the_same_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": row.question, "answer": row.answer} for row in examples(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: kept\nmodel: tiny\ntemplate: plain\ndata: {train: rows.jsonl, test: 0.2, dev: 0.1}\n", "utf-8"
    )
    asked = spec.load(path, ["train.max_steps=9", "train.batch_size=4"])
    plain = flow.prepare(asked)
    monkeypatch.setattr(flow, "render_kept", functools.partial(render_kept, folder=tmp_path / "tokens", at_least=1))
    counted = Counted(monkeypatch)
    for _ in range(2):
        found = flow.prepare(asked)
        assert isinstance(found.rendered_train, Kept) and isinstance(plain.rendered_train, list)
        for side in ("rendered_train", "rendered_dev", "rendered_test"):
            assert list(getattr(found, side)) == list(getattr(plain, side)) != []
        for ours, theirs in zip(found.feed(share=True), plain.feed(share=True), strict=True):
            assert [pack.rows for pack in ours.packs] == [pack.rows for pack in theirs.packs]
        assert found.branches(found.train[3]) == plain.branches(plain.train[3])
    assert counted.rows == len(plain.train) + len(plain.dev) + len(plain.test)
