"""The peak memory of a process is its own."""

from __future__ import annotations

import subprocess
import sys

import torch

from luthier.training import peak

HELD = 300 * 2**20


def test_a_child_does_not_report_its_parents_peak():
    ballast = torch.ones(HELD, dtype=torch.uint8)
    assert peak.resident() > HELD
    code = "from luthier.training import peak; print(peak.resident())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(told) < HELD < len(ballast) + 1


def test_a_peak_stays_when_the_memory_is_given_back():
    ballast = torch.ones(HELD, dtype=torch.uint8)
    most = peak.of(torch.device("cpu"))
    del ballast
    assert peak.of(torch.device("cpu")) > 0.95 * most  # the kernel counts in batches


def test_without_proc_the_system_call_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "STATUS", tmp_path / "none")
    assert 10 * 2**20 < peak.resident() < 2**40
