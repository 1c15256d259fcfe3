"""A checkpoint is whole or not there, and a damaged one is caught before use."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luthier import store
from luthier.errors import BusyError, CheckpointError, StorageError, UsageError
from luthier.spec import build
from luthier.training import checkpoint
from luthier.training.checkpoint import Checkpoints, fingerprint

STATE = {"position": 3, "note": "été"}


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"master": torch.randn(50, generator=generator), "bytes": torch.arange(9, dtype=torch.uint8)}


def filled(folder: Path, steps: int = 3, **more) -> Checkpoints:
    checkpoints = Checkpoints(folder, **more)
    for step in range(1, steps + 1):
        checkpoints.save(step, tensors(step), STATE)
    return checkpoints


def test_round_trip(tmp_path: Path) -> None:
    found = filled(tmp_path).latest()
    assert found.snapshot is not None and found.snapshot.step == 3 and not found.damaged
    assert found.snapshot.state == STATE
    for name, tensor in tensors(3).items():
        assert torch.equal(found.snapshot.tensors[name], tensor)


def test_rotation_keeps_the_newest_and_what_they_pin(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 8):
        checkpoints.save(step, tensors(step), STATE, pin=2 if step < 7 else 7)
    assert checkpoints.steps() == [2, 6, 7]  # 6 still pins 2: it may yet be needed
    checkpoints.save(8, tensors(8), STATE, pin=7)
    assert checkpoints.steps() == [7, 8]
    assert not list(tmp_path.glob(".*"))


def test_at_least_two_are_kept(tmp_path: Path) -> None:
    assert filled(tmp_path, keep=1).steps() == [2, 3]


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE, store.MANIFEST])
def test_every_flipped_bit_is_caught(tmp_path: Path, name: str) -> None:
    """Over all three files; the manifest, which has no digest of its own, included."""
    checkpoints = filled(tmp_path)
    path = checkpoints.path(3) / name
    good = path.read_bytes()
    dice = random.Random(4)
    for _ in range(150):
        bad = bytearray(good)
        bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            checkpoints.read(3)
    path.write_bytes(good)
    assert checkpoints.read(3).step == 3


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE, store.MANIFEST])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncation_falls_back_to_the_one_before_and_says_so(tmp_path: Path, name: str, share: float) -> None:
    checkpoints = filled(tmp_path)
    path = checkpoints.path(3) / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    found = checkpoints.latest()
    assert found.snapshot is not None and found.snapshot.step == 2
    assert "step-0000003" in str(found.damaged[0])
    assert len(list(tmp_path.glob(".bad-step-0000003-*"))) == 1
    assert checkpoints.steps() == [2]


def test_swapped_and_missing_files_are_caught(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, keep=3)
    a, b = (checkpoints.path(step) / checkpoint.TENSORS for step in (2, 3))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    found = checkpoints.latest()
    assert found.snapshot is not None and found.snapshot.step == 1 and len(found.damaged) == 2


def test_a_renamed_folder_is_caught(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    checkpoints.path(3).rename(checkpoints.path(9))
    assert checkpoints.latest().snapshot.step == 2  # type: ignore[union-attr]


def test_all_damaged_is_found_nothing(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    for step in checkpoints.steps():
        (checkpoints.path(step) / checkpoint.TENSORS).unlink()
    found = checkpoints.latest()
    assert found.snapshot is None and len(found.damaged) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_refusing_disk_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """At every fsync and rename of a save, one after the other."""
    checkpoints = filled(tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = calls = 0
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def refusing(name: str):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > done:
                raise OSError(code, os.strerror(code))
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, refusing(name))
    while True:
        calls = 0
        try:
            checkpoints.save(4, tensors(4), STATE)
        except StorageError as error:
            assert "disk" in str(error) and "--resume" in str(error)
            if not checkpoints.path(4).exists():  # the last fsync comes after the rename
                assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole
                assert checkpoints.latest().snapshot.step == 3  # type: ignore[union-attr]
            done += 1
            continue
        break
    assert done >= 4
    assert checkpoints.latest().snapshot.step == 4  # type: ignore[union-attr]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from luthier.training.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, {"master": torch.ones(100)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoints.save(2, {"master": torch.ones(100_000)}, {})
except Exception as error:
    print(type(error).__name__, error)
print(checkpoints.steps(), checkpoints.latest().snapshot.step, sorted(p.name for p in Path(sys.argv[1]).iterdir()))
"""


def test_a_write_that_really_fails_keeps_the_one_before(tmp_path: Path) -> None:
    """The kernel itself refuses the bytes, inside the safetensors writer."""
    told = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "StorageError" in told.stdout and "intact" in told.stdout, told
    assert told.stdout.splitlines()[-1] == "[1] 1 ['step-0000001']"


def test_too_little_room_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = filled(tmp_path)
    monkeypatch.setattr(store, "free_bytes", lambda folder: 500)
    with pytest.raises(StorageError, match="MB free"):
        checkpoints.save(4, tensors(4), STATE)
    with pytest.raises(StorageError, match="MB free"):
        checkpoints.preflight(251)
    checkpoints.preflight(250)
    assert checkpoints.steps() == [2, 3]


def test_staging_of_a_killed_process_is_swept(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    left = tmp_path / f"{store.STAGING}step-0000004-0a0a0a0a"
    left.mkdir()
    (left / checkpoint.TENSORS).write_bytes(b"half")
    assert checkpoints.latest().snapshot.step == 3  # type: ignore[union-attr]
    assert not left.exists()


def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from luthier.training.checkpoint import opened\n"
        "with opened(Path(sys.argv[1])): print('in')"
    )
    with checkpoint.opened(tmp_path) as first:
        first.save(1, tensors(1), STATE)
        told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
        assert told.returncode != 0 and BusyError.__name__ in told.stderr and str(os.getpid()) in told.stderr
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert told.stdout == "in\n"


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    with pytest.raises(UsageError, match="--resume"):
        checkpoints.refuse_others()
    checkpoints.clear()
    checkpoints.refuse_others()


def task(**train) -> dict:
    spec = build({"model": "m", "data": {"train": "a.jsonl"}, "method": {"name": "lora"}, "train": train})
    return fingerprint(spec, data_hash="d", base_hash="b", device="cpu", dtype=torch.float32)


def test_another_task_is_refused_and_names_the_setting(tmp_path: Path) -> None:
    filled(tmp_path, fingerprint=task(learning_rate=1e-3))
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: was 0\.001 and is now 0\.002"):
        Checkpoints(tmp_path, fingerprint=task(learning_rate=2e-3)).latest()
    with pytest.raises(CheckpointError, match="data"):
        Checkpoints(tmp_path, fingerprint={**task(learning_rate=1e-3), "task": {"data": "other"}}).latest()


def test_what_cannot_change_the_result_may_differ(tmp_path: Path) -> None:
    filled(tmp_path, fingerprint=task())
    found = Checkpoints(tmp_path, fingerprint=task(save_every=3, keep=5, report_to=["tensorboard"])).latest()
    assert found.snapshot is not None and not found.snapshot.warnings


def test_another_machine_resumes_with_a_warning(tmp_path: Path) -> None:
    filled(tmp_path, fingerprint=task())
    other = task()
    other["machine"] = {**other["machine"], "threads": 99}
    snapshot = Checkpoints(tmp_path, fingerprint=other).latest().snapshot
    assert snapshot is not None and "correct but not bit-exact" in snapshot.warnings[0] and "99" in snapshot.warnings[0]


def test_nothing_but_safetensors_and_json_is_written(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    names = {path.name for path in checkpoints.path(3).iterdir()}
    assert names == {checkpoint.TENSORS, checkpoint.STATE, store.MANIFEST}
    for name in (checkpoint.STATE, store.MANIFEST):
        json.loads((checkpoints.path(3) / name).read_text("utf-8"))
