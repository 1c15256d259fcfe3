"""Files on disk: the old or the new and never a mix, damage is found, two processes do not meet."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import store
from luthier.errors import BusyError, StorageError, UsageError

# What a save asks of the system, in the order in which a kill may come between.
DURABLE = ("os.fsync", "os.replace", "os.rename")


class Killed(BaseException):
    """Stands for kill -9: no handler of ours may run after it."""


@contextmanager
def killed_at(monkeypatch, number: int):
    """Die before the `number`-th durable call, and forbid every later one, clean-up included."""
    count = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= number:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    def dead(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        for name in DURABLE:
            module, _, attribute = name.partition(".")
            patch.setattr(f"luthier.store.{module}.{attribute}", dying(getattr(os, attribute)))
        patch.setattr("luthier.store.shutil.rmtree", dead)  # a dead process cleans nothing up
        patch.setattr("luthier.store.Path.unlink", dead)
        yield lambda: count


def fill_with(text: str):
    def fill(folder):
        (folder / "a.txt").write_text(text, "utf-8")
        (folder / "inner").mkdir()
        (folder / "inner" / "b.bin").write_bytes(text.encode() * 100)

    return fill


def read(folder):
    return (folder / "a.txt").read_text("utf-8")


@pytest.mark.parametrize("number", range(1, 4))
def test_a_file_is_old_or_new_when_killed(tmp_path, monkeypatch, number):
    path = tmp_path / "file.json"
    store.write_json(path, {"state": "old"})
    with killed_at(monkeypatch, number), pytest.raises(Killed):
        store.write_json(path, {"state": "new" * 1000})
    state = store.read_json(path)["state"]
    assert state in ("old", "new" * 1000)
    store.sweep_staging(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("number", range(1, 12))
def test_a_folder_is_whole_or_absent_when_killed(tmp_path, monkeypatch, number, exists):
    final = tmp_path / "adapter"
    if exists:
        store.publish_folder(final, fill_with("old"))
    died = False
    with killed_at(monkeypatch, number):
        try:
            store.publish_folder(final, fill_with("new"))
        except Killed:
            died = True
    store.sweep_staging(tmp_path)
    assert not list(tmp_path.glob(f"{store.STAGING}*")), "nothing half written is left"
    if final.exists():
        assert store.verify_folder(final) == []
        assert read(final) in (("old", "new") if exists else ("new",))
    else:
        assert died and not exists, "what was there before is not lost"


def test_there_are_calls_to_be_killed_at(tmp_path, monkeypatch):
    store.publish_folder(tmp_path / "adapter", fill_with("old"))
    with killed_at(monkeypatch, 10_000) as count, pytest.raises(Killed):  # at the clean-up of what it replaced
        store.publish_folder(tmp_path / "adapter", fill_with("new"))
    assert 5 <= count() <= 11, "the range above covers every durable call"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_damage_is_found_and_named(tmp_path, damage):
    final = tmp_path / "folder"
    store.publish_folder(final, fill_with("text"), about={"kind": "test"})
    assert store.verify_folder(final) == []
    assert store.manifest(final)["about"] == {"kind": "test"}
    victim = final / "inner" / "b.bin"
    data = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(data[:7] + bytes([data[7] ^ 1]) + data[8:])
    elif damage == "cut":
        victim.write_bytes(data[:-1])
    elif damage == "remove":
        victim.unlink()
    else:
        victim = final / store.MANIFEST
        victim.write_text('{"format": 1, "files":', "utf-8")
    faults = store.verify_folder(final)
    assert len(faults) == 1
    assert victim.name in str(faults[0]) or str(final) in str(faults[0])


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EIO"])
def test_a_refusing_disk_is_a_sentence_and_what_was_there_stays(tmp_path, monkeypatch, code):
    final = tmp_path / "folder"
    store.publish_folder(final, fill_with("old"))
    store.write_text(tmp_path / "file", "old")

    def refuse(*args):
        raise OSError(getattr(errno, code), "refused")

    monkeypatch.setattr("luthier.store.os.fsync", refuse)
    with pytest.raises(StorageError, match="disk") as caught:
        store.publish_folder(final, fill_with("new"))
    assert "--resume" in str(caught.value)
    with pytest.raises(StorageError, match="disk"):
        store.write_text(tmp_path / "file", "new")
    assert read(final) == "old" and store.verify_folder(final) == []
    assert (tmp_path / "file").read_text("utf-8") == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"], "nothing staged is left"


def test_a_failing_fill_leaves_no_trace(tmp_path):
    def fill(folder):
        (folder / "half.txt").write_text("half", "utf-8")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        store.publish_folder(tmp_path / "folder", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_caught_between_its_two_renames_comes_back(tmp_path):
    final = tmp_path / "folder"
    store.publish_folder(final, fill_with("old"))
    final.rename(tmp_path / f"{store.STAGING}old-folder-0123abcd")
    (tmp_path / f"{store.STAGING}folder-89ab0123").mkdir()
    store.sweep_staging(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert store.verify_folder(final) == [] and read(final) == "old"


def test_a_torn_log_line_is_dropped_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "steps.jsonl"
    for index in range(3):
        store.append_jsonl(path, {"index": index})
    whole = path.read_text("utf-8")
    path.write_text(whole + '{"index": 3, "lo', "utf-8")
    assert [line["index"] for line in store.read_jsonl(path)] == [0, 1, 2]
    path.write_text(whole.replace('{"index": 1}', '{"ind'), "utf-8")
    with pytest.raises(StorageError, match=r"steps\.jsonl:2"):
        store.read_jsonl(path)
    assert store.read_jsonl(tmp_path / "absent.jsonl") == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=6), json_values, max_size=4), st.randoms())
def test_hashes_do_not_depend_on_the_order_of_keys(value, random):
    keys = list(value)
    random.shuffle(keys)
    assert store.content_hash({key: value[key] for key in keys}) == store.content_hash(value)
    changed = {**value, "another key": 1}
    assert store.content_hash(changed) != store.content_hash(value)


def test_half_characters_are_written_and_read_back(tmp_path):
    store.write_jsonl(tmp_path / "file.jsonl", [{"text": "字é😀\n"}, {"text": "\u2028"}])
    assert [line["text"] for line in store.read_jsonl(tmp_path / "file.jsonl")] == ["字é😀\n", "\u2028"]


def test_a_locked_run_names_its_owner_and_death_frees_it(tmp_path):
    run = store.Run(tmp_path / "run")
    code = (
        f"import sys; from pathlib import Path; from luthier import store\n"
        f"with store.Run(Path({str(run.folder)!r})).lock(): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(BusyError, match=str(process.pid)), run.lock():
            pass
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    with run.lock():
        assert run.lockfile.read_text("utf-8") == str(os.getpid())


def test_the_record_merges_facts(tmp_path):
    run = store.Run(tmp_path / "run")
    run.update(status="running", name="run")
    assert run.update(status="complete") == {"status": "complete", "name": "run"}
    assert json.loads(run.record.read_text("utf-8"))["status"] == "complete"


def test_runs_are_found_by_folder_and_by_name_and_listed_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.write_text(tmp_path / "runs" / "demo" / "run.yaml", "model: tiny\n")
    assert store.open_run("demo").folder == store.open_run("runs/demo").folder
    with pytest.raises(UsageError, match="runs here: demo"):
        store.open_run("dmo")


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "own"))
    assert store.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LUTHIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_dir() == tmp_path / "xdg" / "luthier"


def test_free_space_is_told_for_folders_to_come(tmp_path):
    assert store.free_bytes(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
