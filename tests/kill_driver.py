"""Train, get killed, go on: forks one child per attempt, so that only this process pays for imports.

    python kill_driver.py KIND FOLDER random TRIALS SEED    kill -9 at a random moment, then again while resuming
    python kill_driver.py KIND FOLDER calls FIRST LAST      kill -9 just before the n-th system call of the saves

Prints one JSON object: the digest of the uninterrupted run, of every killed one, and how many kills struck.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import networks
import torch
import toy

from luthier import registry
from luthier.text import pack
from luthier.training.checkpoint import opened
from luthier.training.loop import Training

STEPS = toy.settings(save_every=1, eval_every=4, patience=None, learning_rate=0.01)


def train(kind: str, folder: Path) -> None:
    """Train to the end, resuming where there is something to resume from, and leave the adapter's digest."""
    dev = pack.plan(toy.rows(8, seed=9), budget=64)
    with opened(folder / "checkpoints") as checkpoints:
        more = {"dev_packs": dev, "checkpoints": checkpoints, "resume": True}
        if kind == "toy":
            subject = toy.Toy(dtype=torch.bfloat16)
            list(toy.training(subject, STEPS, **more))
            digest = subject.digest()
        else:
            lora = registry.make("methods", {"name": "lora", "rank": 4, "dropout": 0.2})
            adapted = lora.attach(networks.network(kind).to(torch.bfloat16), seed=1)
            list(Training(adapted, registry.make("objectives", "sft"), toy.feed(STEPS), STEPS, method=lora, **more))
            (folder / "adapter").mkdir(exist_ok=True)
            adapted.save(folder / "adapter")
            digest = hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    (folder / "end").write_text(digest)


def child(work: Callable[[], None]) -> int:
    """Run `work` in a fork; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)
    raise AssertionError


def finished(pid: int) -> bool:
    """Wait; True after a normal end, False after a kill; anything else is a failure of the test."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "training failed"
    return True


def killed_within(kind: str, folder: Path, seconds: float) -> bool:
    """Train and kill after so many seconds; whether the kill struck a living process."""
    pid = child(lambda: train(kind, folder))
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return not finished(pid)


def killed_at_call(kind: str, folder: Path, number: int) -> bool:
    """Train and die just before the n-th call that makes something durable."""
    calls = 0

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def work() -> None:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        train(kind, folder)

    return not finished(child(work))


def end(kind: str, folder: Path) -> str:
    """Let it finish and return the digest; nothing half written may be left."""
    assert finished(child(lambda: train(kind, folder)))
    left = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".staging")]
    assert not left, left
    return (folder / "end").read_text()


def main(kind: str, folder: Path, mode: str, first: int, last: int) -> None:
    begun = time.perf_counter()
    whole = end(kind, folder / "whole")
    duration = time.perf_counter() - begun
    struck, ends = 0, []
    dice = random.Random(last)
    for trial in range(first) if mode == "random" else range(first, last + 1):
        place = folder / str(trial)
        if mode == "random":
            struck += killed_within(kind, place, dice.uniform(0.05, 0.9) * duration)
            struck += killed_within(kind, place, dice.uniform(0.05, 0.5) * duration)
        else:
            struck += killed_at_call(kind, place, trial)
        ends.append(end(kind, place))
    print(json.dumps({"whole": whole, "ends": ends, "struck": struck, "seconds": duration}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
