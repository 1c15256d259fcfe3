"""`kill -9` at any moment, and the resumed run ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("kill_driver.py")


def drive(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(DRIVER), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def test_three_random_kills_end_with_the_same_adapter(tmp_path: Path) -> None:
    told = drive("llama", tmp_path, "random", 3, 1)
    assert told["ends"] == [told["whole"]] * 3
    assert told["struck"] >= 3


def test_killed_before_each_call_of_a_save(tmp_path: Path) -> None:
    """Every point between staging, fsync, manifest, rename and rotation: the third save is the first that rotates."""
    told = drive("toy", tmp_path, "calls", 18, 34)
    assert told["ends"] == [told["whole"]] * 17
    assert told["struck"] == 17


@pytest.mark.slow
def test_killed_before_each_call_of_the_first_saves(tmp_path: Path) -> None:
    told = drive("toy", tmp_path, "calls", 1, 70)
    assert told["ends"] == [told["whole"]] * 70
    assert told["struck"] == 70


@pytest.mark.slow
def test_twenty_random_kills_end_with_the_same_adapter(tmp_path: Path) -> None:
    told = drive("llama", tmp_path, "random", 20, 2)
    assert told["ends"] == [told["whole"]] * 20
    assert told["struck"] >= 20
