"""Several processes train as one: the same losses and weights, fair shares, and an end for all where one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import ranks_driver
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train_flow import write_task
from torch.utils.flop_counter import FlopCounterMode

import luthier
from luthier import registry, store
from luthier import spec as specs
from luthier.errors import BusyError, DataError, Fault, LuthierError, SpecError, TrainingError
from luthier.flows import events, launch, team
from luthier.model.batch import Batch
from luthier.model.logprob import logprobs
from luthier.records import Step
from luthier.text import pack
from luthier.training import shares

COSTS = st.lists(st.floats(0.1, 100), max_size=30)
HERE = Path(__file__).parent


@given(COSTS, st.integers(1, 5))
def test_every_item_is_dealt_once_and_nobody_has_much_more_than_another(costs: list[float], count: int) -> None:
    dealt = shares.deal(costs, count)
    assert sorted(place for share in dealt for place in share) == list(range(len(costs)))
    loads = [sum(costs[place] for place in share) for share in dealt]
    least = max([sum(costs) / count, *costs]) if costs else 0.0
    if len(costs) > count:
        order = sorted(costs, reverse=True)
        least = max(least, order[count - 1] + order[count])  # two of the first count + 1 meet somewhere
    assert max(loads) <= (4 / 3 - 1 / (3 * count)) * 1.0001 * least or max(loads) <= sum(costs) / count + max(costs) / 3
    assert shares.slowest(costs, count) == pytest.approx(max(loads))


@given(COSTS, st.integers(1, 5))
def test_in_step_all_make_equally_many_passes_but_for_one(costs: list[float], count: int) -> None:
    dealt = shares.rounds(costs, count)
    assert sorted(place for share in dealt for place in share) == list(range(len(costs)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    passes = [max(costs[share[turn]] for share in dealt if turn < len(share)) for turn in range(max(map(len, dealt)))]
    assert shares.slowest(costs, count, in_step=True) == pytest.approx(sum(passes))


def test_the_longest_come_first() -> None:
    assert shares.deal([1, 1, 1, 1, 4, 4], 2) == [[0, 2, 4], [1, 3, 5]]
    assert shares.deal([9, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("in_step", [False, True])
def test_packs_are_cut_for_more_processes_and_hold_the_same_targets(count: int, in_step: bool) -> None:
    rows, cost = toy.rows(24), shares.Cost()
    whole = pack.plan(rows, budget=4096)
    cut = shares.planner(count, cost, in_step=in_step)(rows, budget=4096)
    assert len(whole) == 1
    assert len(cut) >= count

    def targets(packs: list[Any]) -> list[tuple[str, int, float]]:
        found = [(one.rows[r], int(t), float(w)) for one in packs
                 for r, t, w in zip(one.target_row, one.target_ids, one.target_weights, strict=True)]  # fmt: skip
        return sorted(found)

    assert targets(cut) == targets(whole)
    slowest = shares.slowest([cost(one) for one in cut], count, in_step=in_step)
    assert slowest < 0.75 * cost(whole[0])
    small = shares.planner(count, cost)(rows, budget=40)
    assert max(map(len, small)) <= 40


def test_one_process_has_the_packs_that_it_always_had() -> None:
    rows = toy.rows(24)
    ours, plain = shares.planner(1, shares.Cost())(rows, budget=50), pack.plan(rows, budget=50)
    assert [one.ids.tolist() for one in ours] == [one.ids.tolist() for one in plain]


def test_a_pack_is_foreseen_to_cost_what_it_multiplies() -> None:
    """Ratios of costs against ratios of counted operations, forward and backward, of packs of all shapes."""
    net = registry.make("methods", {"name": "lora", "rank": 2}).attach(networks.network("llama"), seed=0).model.train()
    cost, found = shares.Cost.of(net), []
    for count in (1, 4, 20):
        (one,) = pack.plan(toy.rows(count), budget=4096)
        with FlopCounterMode(display=False) as counter:
            logprobs(net, Batch.of(one, torch.device("cpu"))).sum().backward()
        found.append((cost(one), counter.get_total_flops()))
    first = found[0][0] / found[0][1]
    assert [foreseen / counted / first for foreseen, counted in found] == pytest.approx([1, 1, 1], rel=0.15)


ERRORS = [
    TrainingError("a", remedy="b"), DataError("many", where="x:1", faults=[Fault("f", "g", "h")]), BusyError("held"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_crosses_processes_whole(error: LuthierError) -> None:
    again = launch.revived(json.loads(json.dumps(launch.written(error))))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.exit_code == error.exit_code


def test_an_error_of_others_crosses_as_a_plain_one() -> None:
    assert "unexpected KeyError: 'x'" in str(launch.revived(launch.written(KeyError("x"))))


STEP = Step(
    index=1, epoch=0.5, loss=1.0, learning_rate=0.1, grad_norm=1.0, tokens=3, plain_tokens=4, supervised=2.0, examples=1,
    seconds=0.1, memory=5, dev_loss=None,
)  # fmt: skip
EVENTS = [
    events.Stage("tune", "x"), events.Progress(STEP, 9, 1.5), events.Answering("base", 1, 2),
    events.Studied("lora", 1, 2, 3.0), events.Note("ü\n", "warning"),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_crosses_processes_whole(event: events.Event) -> None:
    assert "\n" not in launch.packed(event)
    assert launch.unpacked(launch.packed(event)) == event


def task(**train: Any) -> specs.RunSpec:
    return specs.build({"model": {"name": "tiny", "device": "cpu"}, "data": {"train": ["/a.jsonl"]}, "train": train})


def test_how_many_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.several(task()) == 1
    assert launch.several(task(processes=3)) == 3
    assert launch.several(task(processes="auto")) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.several(task(processes=3)) == 1  # this is one of them


def test_a_base_in_parts_needs_several_processes_and_plain_weights() -> None:
    with pytest.raises(SpecError, match="several processes") as told:
        team.Team.of(task(sharding="full"))
    assert "train.processes" in str(told.value)
    with pytest.raises(SpecError, match="cannot stand with quantize"):
        specs.build({"model": "tiny", "data": {"train": ["/a"]}, "quantize": "nf4", "train": {"sharding": "full"}})
    with pytest.raises(SpecError, match=r"train\.processes"):
        task(processes=0)


def started(count: int, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """Run cases of `ranks_driver` in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={count}", str(HERE / "ranks_driver.py"), json.dumps(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert told.returncode == 0, told.stderr[-3000:]
    found = next(line for line in told.stdout.splitlines() if line.startswith("END"))
    return list(json.loads(found[4:]))


def alike(ours: dict[str, Any], folder: str, alone: dict[str, Any], reference: str) -> None:
    """Losses, dev losses and the published adapter are those of the single process."""
    assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert ours["dev"] == pytest.approx(alone["dev"], rel=1e-5)
    assert len(set(ours["digests"])) == 1  # every process has the same bits
    mine, wanted = (load_file(f"{f}/adapter/adapter_model.safetensors") for f in (folder, reference))
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A single process over all steps."""
    folder = str(tmp_path_factory.mktemp("alone"))
    return folder, ranks_driver.train({"folder": folder})


def test_two_processes_train_what_one_does_with_a_whole_base_and_with_one_in_parts(
    tmp_path: Path, alone: tuple[str, dict[str, Any]]
) -> None:
    cases = [
        {"folder": str(tmp_path / "whole")},
        {"folder": str(tmp_path / "parts"), "sharded": True},
        {"folder": str(tmp_path / "again"), "sharded": True, "settings": {"checkpointing": True}},
    ]
    whole, parts, again = started(2, *cases)
    for ours, case in zip((whole, parts, again), cases, strict=True):
        alike(ours, case["folder"], alone[1], alone[0])
    assert sum(parts["held"]) < 1.8 * whole["held"][0]  # embeddings and head are whole in both
    assert sum(whole["held"]) == 2 * alone[1]["held"][0]
    assert all(ours >= one for ours, one in zip(whole["tokens"], alone[1]["tokens"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_four_processes_do_too(tmp_path: Path, kind: str) -> None:
    cases = [
        {"folder": str(tmp_path / f"{name}{budget}"), "kind": kind, "sharded": name == "parts", "budget": budget}
        for name in ("whole", "parts")
        for budget in (4096, 16)
    ]
    wanted = ranks_driver.train({"folder": str(tmp_path / "one"), "kind": kind})
    for ours, case in zip(started(4, *cases), cases, strict=True):
        alike(ours, case["folder"], wanted, str(tmp_path / "one"))


@pytest.mark.slow
def test_a_resumed_run_is_exact_in_as_many_processes_and_says_so_in_others(tmp_path: Path) -> None:
    """With dropout, so that the processes' own random states matter."""
    cases: list[dict[str, Any]] = []
    for sharded in (False, True):
        here = {"sharded": sharded, "method": {"dropout": 0.3}}
        for name, more in (("whole", {}), ("cut", {"stop": 5}), ("cut", {"resume": True})):
            cases.append({"folder": str(tmp_path / f"{name}-{sharded}"), **here, **more})
    cases.append({"folder": str(tmp_path / "other"), "stop": 5})
    *found, _ = started(2, *cases)
    for whole, cut, resumed in (found[:3], found[3:]):
        assert cut["losses"] == whole["losses"][:5]
        assert resumed["losses"] == whole["losses"][4:]  # the step that was broken off is taken again
        assert resumed["digests"] == whole["digests"]
        assert resumed["notes"] == []
    resumed = ranks_driver.train({"folder": str(tmp_path / "other"), "resume": True})
    assert resumed["notes"] == ["resume is correct but not bit-exact: another number of processes"]
    straight = ranks_driver.train({"folder": str(tmp_path / "straight")})
    assert resumed["losses"] == pytest.approx(straight["losses"][4:], rel=1e-4)


LISTENING = """
import os, signal, subprocess, sys
import luthier
from luthier.errors import LuthierError
task, deed, *overrides = sys.argv[1:]
def members():
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(pid) for pid, parent, args in rows if parent == str(os.getpid()) and "luthier.flows.member" in args]
def hear(event):
    if type(event).__name__ == "Progress" and event.step.index == 3:
        os.kill(members()[-1] if deed == "kill" else os.getpid(), getattr(signal, "SIGKILL" if deed == "kill" else "SIGINT"))
try:
    luthier.train(task, overrides, on_event=hear)
except LuthierError as error:
    print(f"{type(error).__name__}: {error}")
print("left", len(members()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["kill", "interrupt"])
def test_where_one_process_ends_all_do_and_the_run_can_go_on(tmp_path: Path, deed: str) -> None:
    path = write_task(tmp_path)
    overrides = ["train.processes=2", "train.save_every=1", "train.epochs=12"]
    command = [sys.executable, "-c", LISTENING, str(path), deed, *overrides]
    told = subprocess.run(command, capture_output=True, text=True, timeout=900)
    wanted = "process 2 of 2 was ended from outside (SIGKILL)" if deed == "kill" else "everything is saved"
    assert "TrainingError" in told.stdout and wanted in told.stdout, told.stderr[-2000:]
    assert "--resume" in told.stdout
    assert "left 0" in told.stdout
    luthier.train(path, [*overrides, "train.processes=1"], resume=True)
    kept = store.read_json(tmp_path / "runs" / "task" / "record.json")["training"]
    assert kept["resumed_from"] >= 2
    assert any("another number of processes" in note for note in kept["notes"])


@pytest.mark.slow
def test_the_whole_job_in_processes_gives_what_one_gives(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    path.write_text(path.read_text().replace("dropout: 0.1", "dropout: 0.0").replace("1.0e-2", "1.0e-3"))
    heard: list[events.Event] = []
    reports = {
        "one": luthier.train(path, ["name=one"]),
        "two": luthier.train(path, ["name=two", "train.processes=2"], on_event=heard.append),
        "parts": luthier.train(path, ["name=parts", "train.processes=2", "train.sharding=full"]),
    }
    wanted = store.Run(tmp_path / "runs" / "one")
    for name in ("two", "parts"):
        run = store.Run(tmp_path / "runs" / name)
        assert reports[name]["primary"]["n"] == reports["one"]["primary"]["n"]
        losses = [[step["loss"] for step in store.read_jsonl(one.steps)] for one in (run, wanted)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        ours, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, wanted))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=5e-5)
        answers = [store.read_jsonl(one.predictions / "test" / "base.jsonl") for one in (run, wanted)]
        assert [answer["example_id"] for answer in answers[0]] == [answer["example_id"] for answer in answers[1]]
        same = [ours["text"] == theirs["text"] for ours, theirs in zip(*answers, strict=True)]
        assert sum(same) >= 0.9 * len(same)  # a tie may fall the other way beside other rows
    kinds = {type(event).__name__ for event in heard}
    assert kinds >= {"Stage", "Progress", "Answering"}
    again = luthier.train(path, ["name=two", "train.processes=2"], resume=True)  # finished: everything is there
    assert again["primary"] == reports["two"]["primary"]
    with store.Run(tmp_path / "runs" / "two").lock(), pytest.raises(BusyError, match="in use by process"):
        luthier.train(path, ["name=two", "train.processes=2"], resume=True)


@pytest.mark.slow
def test_torchrun_starts_it_as_well(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "luthier"]
    path = write_task(tmp_path)
    told = subprocess.run([*command, "train", str(path)], capture_output=True, text=True, timeout=900)
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.count("report.html") == 1  # the first one speaks
    assert store.read_json(tmp_path / "runs" / "task" / "record.json")["status"] == "complete"


@pytest.mark.slow
def test_methods_that_need_whole_matrices_say_so(tmp_path: Path) -> None:
    path = write_task(tmp_path, rows=40)
    for method in ("dora", "full"):
        overrides = [f"name={method}", f"method={method}", "train.processes=2", "train.sharding=full"]
        with pytest.raises(SpecError, match=f"the method '{method}'") as told:
            luthier.train(path, overrides)
        assert "lora" in str(told.value)


def test_signals_of_the_starter_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with launch._signals_kept():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before
