"""Stopped anywhere, a resumed run ends with the same bytes; without any one part of the state it would not."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from toy import Toy

from luthier.records import Pack
from luthier.text import pack
from luthier.training import rng
from luthier.training.checkpoint import Checkpoints, Found, Snapshot

TOTAL = 12
ASKED = toy.settings(save_every=1, eval_every=5, weight_decay=0.01)


def dev() -> list[Pack]:
    return pack.plan(toy.rows(8, seed=9), budget=64)


def train(
    folder: Path, *, dtype: torch.dtype, until: int = TOTAL + 1, resume: bool = False, kind=Checkpoints, asked=ASKED
):
    """Train the toy, dropping the generator after `until` steps; return its end, losses and outcome."""
    subject = Toy(dtype=dtype)
    training = toy.training(subject, asked, dev_packs=dev(), checkpoints=kind(folder), resume=resume)
    losses = {}
    for step in training:
        losses[step.index] = (step.loss, step.dev_loss, step.learning_rate, step.grad_norm)
        if step.index == until:
            break
    return subject.digest(), losses, training.outcome


@pytest.mark.parametrize(("dtype", "stride"), [(torch.float32, 1), (torch.bfloat16, 4)])
def test_resume_after_every_step_gives_the_same_bytes(tmp_path: Path, dtype: torch.dtype, stride: int) -> None:
    end, losses, outcome = train(tmp_path / "whole", dtype=dtype)
    assert len(losses) == TOTAL
    for until in range(1, TOTAL + 1, stride):
        folder = tmp_path / f"{until}"
        _, first, _ = train(folder, dtype=dtype, until=until)
        resumed_end, second, resumed = train(folder, dtype=dtype, resume=True)
        assert resumed_end == end
        assert first | second == losses
        assert resumed.resumed_from == (until - 1 or None)  # the step that was cut off is the one that was not saved
        assert resumed.evaluations == outcome.evaluations
        assert dataclasses.replace(resumed.totals, seconds=0) == dataclasses.replace(outcome.totals, seconds=0)


def test_stopped_at_every_step_in_turn(tmp_path: Path) -> None:
    """A dozen stops in one run."""
    end, _, _ = train(tmp_path / "whole", dtype=torch.float32)
    resumed = ""
    for until in range(2, TOTAL + 2):
        resumed, _, _ = train(tmp_path / "often", dtype=torch.float32, until=until, resume=True)
    assert resumed == end


def test_sparse_checkpoints_lose_steps_and_nothing_else(tmp_path: Path) -> None:
    sparse = toy.settings(save_every=4, eval_every=5, weight_decay=0.01)
    end, _, _ = train(tmp_path / "whole", dtype=torch.float32, asked=sparse)
    train(tmp_path / "cut", dtype=torch.float32, until=8, asked=sparse)
    resumed_end, losses, outcome = train(tmp_path / "cut", dtype=torch.float32, resume=True, asked=sparse)
    assert resumed_end == end and min(losses) == 6 and outcome.resumed_from == 5  # the best dev loss is always saved


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    end, _, first = train(tmp_path, dtype=torch.float32)
    again, losses, outcome = train(tmp_path, dtype=torch.float32, resume=True)
    assert again == end and not losses
    assert (outcome.ended, outcome.restored_step) == (first.ended, first.restored_step)


def test_early_stop_is_remembered(tmp_path: Path) -> None:
    asked = toy.settings(epochs=25, patience=3, eval_every=2, learning_rate=0.05)
    end, losses, first = train(tmp_path / "whole", dtype=torch.float32, until=99, asked=asked)
    assert first.ended == "early"
    train(tmp_path / "cut", dtype=torch.float32, until=max(losses) - 1, asked=asked)
    resumed_end, _, second = train(tmp_path / "cut", dtype=torch.float32, until=99, resume=True, asked=asked)
    assert resumed_end == end and (second.ended, second.steps) == ("early", first.steps)
    _, more, _ = train(tmp_path / "cut", dtype=torch.float32, until=99, resume=True, asked=asked)
    assert not more


def test_nothing_to_resume_from_starts_at_the_beginning_and_says_so(tmp_path: Path) -> None:
    end, _, _ = train(tmp_path / "whole", dtype=torch.float32)
    resumed_end, losses, outcome = train(tmp_path / "none", dtype=torch.float32, resume=True)
    assert resumed_end == end and len(losses) == TOTAL
    assert "started at the beginning" in outcome.notes[0] and outcome.resumed_from is None


def test_a_damaged_checkpoint_costs_one_interval(tmp_path: Path) -> None:
    end, _, _ = train(tmp_path / "whole", dtype=torch.float32)
    train(tmp_path / "cut", dtype=torch.float32, until=8)
    path = tmp_path / "cut" / "step-0000007" / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    resumed_end, losses, outcome = train(tmp_path / "cut", dtype=torch.float32, resume=True)
    assert resumed_end == end and min(losses) == 7
    assert "step-0000007" in outcome.notes[0] and "other bytes" in outcome.notes[0]


def without_random(snapshot: Snapshot) -> Snapshot:
    return dataclasses.replace(
        snapshot, tensors={k: v for k, v in snapshot.tensors.items() if not k.startswith("random.")}
    )


def without_feed(snapshot: Snapshot) -> Snapshot:
    return dataclasses.replace(snapshot, state={**snapshot.state, "feed": {"step": 0}})


def without_moment(name: str) -> Callable[[Snapshot], Snapshot]:
    def drop(snapshot: Snapshot) -> Snapshot:
        gone = torch.zeros_like(snapshot.tensors[name])
        return dataclasses.replace(snapshot, tensors={**snapshot.tensors, name: gone})

    return drop


def without_step(snapshot: Snapshot) -> Snapshot:
    progress = {**snapshot.state["progress"], "step": snapshot.step + 1}
    return dataclasses.replace(snapshot, state={**snapshot.state, "progress": progress})


LOSSES = {
    "nothing": lambda snapshot: snapshot,
    "random": without_random,
    "feed": without_feed,
    "first moment": without_moment("exp_avg"),
    "second moment": without_moment("exp_avg_sq"),
    "optimiser step": without_moment("optimiser_step"),
    "master": without_moment("master"),
    "schedule": without_step,
}


@pytest.mark.parametrize("part", LOSSES)
def test_every_part_of_the_state_is_needed(tmp_path: Path, part: str) -> None:
    """The negative control: without the part the ends differ, with all of it they agree."""

    class Forgetful(Checkpoints):
        def latest(self) -> Found:
            found = super().latest()
            assert found.snapshot is not None
            return Found(LOSSES[part](found.snapshot), found.damaged)

    end, _, _ = train(tmp_path / "whole", dtype=torch.float32)
    train(tmp_path / "cut", dtype=torch.float32, until=8)
    resumed_end, _, _ = train(tmp_path / "cut", dtype=torch.float32, resume=True, kind=Forgetful)
    assert (resumed_end == end) == (part == "nothing")


def test_every_generator_comes_back_where_it_stood() -> None:
    """An odd number of normal draws, so that the kept halves of pairs matter too."""
    device = torch.device("cpu")

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), float(torch.randn(()))]

    draw()
    state = rng.capture(device)
    first, second = draw(), draw()
    rng.restore(state, device)
    assert [draw(), draw()] == [first, second]
    with rng.aside(1, device):
        draw()
    third = draw()
    rng.restore(state, device)
    assert [draw(), draw(), draw()] == [first, second, third]
