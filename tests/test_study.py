"""A study of methods on the tiny model: what it leaves, what a kill costs, what is refused, what the page shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from test_train_flow import write_task

from luthier import spec as specs
from luthier import store
from luthier.errors import Diverged, MissingExtra, SpecError, TrainingError, UsageError
from luthier.evaluate import study_page
from luthier.flows import calibrate, events, find_lr, pools, probe, study, trials
from luthier.flows.trials import Bench, Trial
from luthier.hub import cards
from luthier.training import budget
from luthier.training.budget import Shape

STEPS = 8
SHAPES = budget.shapes
MEMORY = 123 * 2**20


class Killed(BaseException):
    """What a test stops a study with: nothing may catch it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Memory is measured by a test of its own; every trial keeps checkpoints, as long ones do."""
    monkeypatch.setattr(probe, "peak_memory", lambda bench, trial: MEMORY)
    monkeypatch.setattr(study, "WORTH_SAVING", 0.0)
    monkeypatch.setattr("luthier.flows.searching.WORTH_SAVING", 0.0)
    monkeypatch.setattr("luthier.evaluate.speed.ROUNDS", 1)
    monkeypatch.setattr(budget, "shapes", small)


def small(full, seeds, top):
    """A study of three rates and one rung: what most of these tests need."""
    return iter([Shape(3, (4,), full, seeds, top)])


def task(folder: Path, *overrides: str):
    path = folder / "task.yaml" if (folder / "task.yaml").exists() else write_task(folder)
    given = ["train.learning_rate=null", f"train.max_steps={STEPS}", "evaluate.max_new_tokens=12"]
    return specs.load(path, [*given, *overrides])


class Counter:
    """Counts trials that are really trained, and what they resumed from."""

    def __init__(self, monkeypatch) -> None:
        self.trained: list[tuple] = []
        learn = Bench._learn

        def counted(bench, trial, *rest):
            self.trained.append((trial.method["name"], trial.rate, trial.seed, trial.steps, trial.final))
            return learn(bench, trial, *rest)

        monkeypatch.setattr(Bench, "_learn", counted)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, told = tmp_path_factory.mktemp("study"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "peak_memory", lambda bench, trial: MEMORY)
        patch.setattr("luthier.evaluate.speed.ROUNDS", 1)
        patch.setattr(budget, "shapes", lambda *asked: iter([Shape(4, (4,), *asked)]))
        report = study.study_methods(
            task(folder), methods=["lora", "ia3", {"name": "lora", "rank": 2}], seeds=2, top=1, on_event=told.append
        )
    return folder / "runs" / "task-methods", report, told


def test_a_study_tells_every_cost_of_every_method(finished):
    place, report, _ = finished
    assert report == json.loads((place / "study.json").read_text("utf-8"))
    rows = report["methods"]
    assert [row["status"] for row in rows] == ["judged"] * 3
    assert {row["label"] for row in rows} == {"lora", "ia3", "lora rank=2"}
    for row in rows:
        score = row["score"]
        assert score["low"] <= score["value"] <= score["high"]
        assert row["trainable"] > 0 and row["share"] == row["trainable"] / report["parameters"]
        assert row["memory"] == MEMORY and row["step_seconds"] > 0 and row["run_seconds"] > 0
        assert row["forgetting"]["low"] <= row["forgetting"]["rise"] <= row["forgetting"]["high"]
        assert row["speed"]["attached"]["ratio"] > 0 and row["speed"]["merged"]["ratio"] > 0
        assert len(row["search"]["curve"]) - len(row["search"]["widened"]) == 4, "as many trials for every method"
    assert report["base"]["dev_loss"] > min(row["dev_loss"] for row in rows)
    assert report["n"] == report["rows"]["test"] > 8 and not report["provisional"]
    by_label = {row["label"]: row for row in rows}
    assert by_label["lora rank=2"]["trainable"] < by_label["lora"]["trainable"]
    assert by_label["lora rank=2"]["adapter_bytes"] < by_label["lora"]["adapter_bytes"]


def test_only_the_best_get_all_seeds(finished):
    _, report, _ = finished
    counts = sorted(len(row["score"]["seeds"]) for row in report["methods"])
    assert counts == [1, 1, 2]
    best = min(report["methods"], key=lambda row: row["dev_losses"][0])
    assert len(best["score"]["seeds"]) == 2


def test_adapters_are_whole_and_load(finished):
    place, report, _ = finished
    for row in report["methods"]:
        for adapter in row["adapters"]:
            card = cards.read(place / adapter)
            assert card.method["name"] == row["method"]["name"]
    assert not list(place.rglob("checkpoints")), "a finished trial keeps none"


def test_the_listener_hears_of_trials_and_of_time_left(finished):
    _, _, told = finished
    heard = [event for event in told if isinstance(event, events.Studied)]
    assert [event.done for event in heard] == list(range(1, len(heard) + 1))
    assert heard[-1].done == heard[-1].total
    assert all(event.seconds_left >= 0 for event in heard)


def test_the_terminal_shows_the_table_and_the_sentence(finished, capsys):
    _, report, _ = finished
    study.print_study(report, Console(width=200))
    said = capsys.readouterr().out
    assert report["sentence"] in said and "lora rank=2" in said and "json_fields" in said


def test_the_page_is_one_offline_file_and_escapes_what_it_shows(finished):
    _, report, _ = finished
    evil = json.loads(json.dumps(report))
    evil["methods"][0]["label"] = evil["name"] = "<script>alert(1)</script>\u202e"
    evil["methods"][1] |= {"status": "refused", "why": "<img src=x>"}
    evil["tied"] = []
    html = study_page.render(evil)
    assert "<script" not in html and "<img" not in html and "\u202e" not in html
    assert "http://" not in html and "https://" not in html
    assert html.count("<svg") == 1 + len(evil["methods"])
    assert "&lt;script&gt;" in html


def test_a_page_without_any_judged_method_still_stands(finished):
    _, report, _ = finished
    bare = json.loads(json.dumps(report))
    for row in bare["methods"]:
        row |= {"status": "diverged", "why": "it did", "search": None}
    bare["tied"], bare["advice"] = [], {"take": None, "sentence": "None.", "command": None}
    assert "diverged: it did" in study_page.render(bare)


def test_a_finished_study_is_not_paid_for_again(finished, tmp_path, monkeypatch):
    place, report, _ = finished
    shutil.copytree(place.parent.parent, tmp_path / "again")
    monkeypatch.setattr(budget, "shapes", lambda *asked: iter([Shape(4, (4,), *asked)]))
    counter = Counter(monkeypatch)
    spec = task(tmp_path / "again").model_copy(update={"runs": str(tmp_path / "again" / "runs")})
    monkeypatch.setattr(calibrate, "timed", lambda *_: pytest.fail("its costs are known"))
    monkeypatch.setattr("luthier.flows.allotment.Allotment.measured", _as_it_was(place))
    again = study.study_methods(spec, methods=["lora", "ia3", {"name": "lora", "rank": 2}], seeds=2, top=1)
    assert not counter.trained
    strip = lambda rows: [(row["label"], row["score"], row["dev_loss"]) for row in rows]  # noqa: E731
    assert strip(again["methods"]) == strip(report["methods"])
    assert again["ledger"]["opened"] == report["ledger"]["opened"] + 1


def _as_it_was(place):
    """Costs as the first study kept them: the copied task has other paths, so its plan is made anew."""
    told = store.read_json(place / "plan.json")["measured"]
    methods = {
        label: calibrate.Measured(calibrate.Cost(**one["cost"]), one["memory"])
        for label, one in told["methods"].items()
    }  # fmt: skip
    return lambda self: (methods, calibrate.Closing(**told["closing"]))


def stopping_at(point):
    """A listener that kills the study when `point(event)` says so."""

    def listen(event):
        if point(event):
            raise Killed

    return listen


def kill_points():
    """After the third finished trial; in the middle of a full-length run; while the test rows are answered."""
    deep = {"final": False}

    def in_a_long_run(event):
        deep["final"] |= isinstance(event, events.Stage) and event.name == "full-length runs"
        return deep["final"] and isinstance(event, events.Progress) and event.step.index == 6

    return {
        "third trial": lambda event: isinstance(event, events.Studied) and event.done == 3,
        "long run": in_a_long_run,
        "answers": lambda event: isinstance(event, events.Answering) and event.system.startswith("ia3"),
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "peak_memory", lambda bench, trial: MEMORY)
        patch.setattr("luthier.evaluate.speed.ROUNDS", 1)
        patch.setattr(budget, "shapes", small)
        counter = Counter(patch)
        report = study.study_methods(task(folder), methods=["ia3"], seeds=2)
    return report, counter.trained


@pytest.mark.parametrize("where", ["third trial", "long run", "answers"])
def test_a_killed_study_goes_on_without_repeating_a_trial(where, unbroken, tmp_path, monkeypatch):
    whole, planned = unbroken
    spec, counter = task(tmp_path), Counter(monkeypatch)
    with pytest.raises(Killed):
        study.study_methods(spec, methods=["ia3"], seeds=2, on_event=stopping_at(kill_points()[where]))
    before = len(counter.trained)
    assert store.read_json(tmp_path / "runs" / "task-methods" / "record.json")["status"] == "failed"
    report = study.study_methods(spec, methods=["ia3"], seeds=2)
    cut = 1 if where == "long run" else 0  # that trial is begun twice, from its checkpoint the second time
    assert 0 < before <= len(planned) and len(counter.trained) == len(planned) + cut
    assert set(counter.trained) == set(planned)
    assert report["methods"][0]["score"] == whole["methods"][0]["score"]
    assert report["methods"][0]["dev_losses"] == whole["methods"][0]["dev_losses"]


def test_the_trial_that_a_kill_cut_goes_on_from_its_checkpoint(tmp_path):
    bench = Bench.open(task(tmp_path), tmp_path / "bench")
    trial = Trial(trials.resolve(bench.spec, ["lora"])["lora"], 1e-2, 0, STEPS, final=True)
    with pytest.raises(Killed):
        bench.run(trial, stopping_at(lambda event: isinstance(event, events.Progress) and event.step.index == 6))
    assert bench.kept(trial) is None
    result = bench.run(trial)
    assert result["resumed_from"] and result["resumed_from"] >= 4
    other = Bench.open(task(tmp_path), tmp_path / "other").run(trial)
    assert result["digest"] == other["digest"], "with the bytes of an unbroken one"


@pytest.mark.parametrize("step", [1, STEPS])
def test_ctrl_c_stops_the_study_after_the_step_and_keeps_what_is_done(step, tmp_path, monkeypatch):
    import os
    import signal

    def press(event):
        if isinstance(event, events.Progress) and event.total == STEPS and event.step.index == step:
            os.kill(os.getpid(), signal.SIGINT)

    spec, counter = task(tmp_path), Counter(monkeypatch)
    with pytest.raises(TrainingError, match="what was saved is kept"):
        study.study_methods(spec, methods=["ia3"], seeds=1, on_event=press)
    assert store.read_json(tmp_path / "runs" / "task-methods" / "record.json")["status"] == "interrupted"
    study.study_methods(spec, methods=["ia3"], seeds=1)
    finals = [trained for trained in counter.trained if trained[4]]
    assert len(finals) == (2 if step == 1 else 1), "finished by its last step, it is not begun again"


def test_every_trial_gives_the_base_back_bit_for_bit(tmp_path):
    bench = Bench.open(task(tmp_path), tmp_path / "bench")
    before = {name: tensor.clone() for name, tensor in bench.base.state_dict().items()}
    for name, options in trials.resolve(bench.spec, ["lora", "ia3"]).items():
        bench.run(Trial(options, 1e-2, 0, 4), events.silent)
        after = bench.base.state_dict()
        assert after.keys() == before.keys(), name
        assert all((after[key] == before[key]).all() for key in before), name


def test_a_method_that_leaves_the_base_changed_is_found_out(tmp_path):
    import torch

    bench = Bench.open(task(tmp_path), tmp_path / "bench")
    options = trials.resolve(bench.spec, ["ia3"])["ia3"]
    with pytest.raises(TrainingError, match="left the base changed"), bench.attached(Trial(options, 1e-3, 0, 2)):
        weight = next(bench.base.parameters())
        with torch.no_grad():
            weight.view(-1)[3] += 0.25


def test_a_trials_key_holds_all_that_decides_it(tmp_path):
    bench = Bench.open(task(tmp_path), tmp_path / "bench")
    options = trials.resolve(bench.spec, ["ia3"])["ia3"]
    plain = Trial(options, 1e-3, 0, 4)
    others = [
        Trial(options, 2e-3, 0, 4), Trial(options, 1e-3, 1, 4), Trial(options, 1e-3, 0, 5),
        Trial(trials.resolve(bench.spec, ["lora"])["lora"], 1e-3, 0, 4), Trial(options, 1e-3, 0, 4, final=True),
    ]  # fmt: skip
    keys = {bench.key(trial) for trial in (plain, *others)}
    assert len(keys) == 6
    assert bench.key(Trial(options, 1e-3, 0, 4, saves=False)) == bench.key(plain)
    wider = Bench.open(task(tmp_path, "train.batch_size=4"), tmp_path / "wider")
    assert wider.key(plain) != bench.key(plain)
    renamed = Bench.open(task(tmp_path, "name=other", "evaluate.few_shot=0"), tmp_path / "renamed")
    assert renamed.key(plain) == bench.key(plain), "what is not trained by does not matter"


def test_a_lost_adapter_is_made_again(tmp_path):
    bench = Bench.open(task(tmp_path), tmp_path / "bench")
    trial = Trial(trials.resolve(bench.spec, ["ia3"])["ia3"], 1e-2, 0, 4, final=True)
    first = bench.run(trial)
    shutil.rmtree(bench.adapter(first))
    assert bench.kept(trial) is None and bench.run(trial)["digest"] == first["digest"]


def diverging(monkeypatch, when):
    learn = Bench._learn

    def maybe(bench, trial, *rest):
        if when(trial):
            raise Diverged("the loss is not a number in step 3")
        return learn(bench, trial, *rest)

    monkeypatch.setattr(Bench, "_learn", maybe)


def test_diverged_trials_lose_and_the_study_goes_on(tmp_path, monkeypatch):
    diverging(monkeypatch, lambda trial: trial.rate > 2e-2)
    report = study.study_methods(task(tmp_path), methods=["ia3"], seeds=1)
    (row,) = report["methods"]
    assert row["learning_rate"] <= 2e-2
    assert None in [one["loss"] for one in row["search"]["curve"]]
    assert "made on one seed" in report["sentence"] or report["advice"]["take"] is None


def test_a_rate_that_diverges_over_the_full_length_gives_way_to_a_lower_one(tmp_path, monkeypatch):
    diverging(monkeypatch, lambda trial: trial.final and trial.rate > 5e-2)
    report = study.study_methods(task(tmp_path), methods=["ia3"], seeds=2)
    (row,) = report["methods"]
    assert row["learning_rate"] <= 5e-2 < row["search"]["rate"] and len(row["score"]["seeds"]) == 2
    assert any("diverged over the full length" in text for text in report["said"])


def test_a_method_that_always_diverges_is_listed_last_with_the_reason(tmp_path, monkeypatch):
    diverging(monkeypatch, lambda trial: trial.method["name"] == "lora")
    report = study.study_methods(task(tmp_path), methods=["lora", "ia3"], seeds=1)
    assert [row["status"] for row in report["methods"]] == ["judged", "diverged"]
    assert "diverged" in report["methods"][1]["why"]


def test_a_method_that_the_base_cannot_take_is_refused_and_the_others_go_on(tmp_path):
    told = []
    methods = [{"name": "lora", "target_modules": ["no_such_layer"]}, "ia3"]
    report = study.study_methods(task(tmp_path), methods=methods, seeds=1, on_event=told.append)
    assert [row["status"] for row in report["methods"]] == ["judged", "refused"]
    assert "no_such_layer" in report["methods"][1]["why"]
    assert any(isinstance(event, events.Note) and "left out" in event.text for event in told)
    with pytest.raises(SpecError, match="none of these methods"):
        study.study_methods(task(tmp_path, "name=none"), methods=methods[:1])


def test_unknown_methods_and_options_are_told_all_at_once(tmp_path):
    with pytest.raises(SpecError) as error:
        study.study_methods(task(tmp_path), methods=["lore", {"name": "lora", "rnak": 2}, "ia3"])
    assert len(error.value.faults) == 2 and "lora" in str(error.value) and "rank" in str(error.value)


def test_the_tasks_own_method_keeps_its_options(tmp_path):
    found = trials.resolve(task(tmp_path, "method.rank=3"), ["lora", "ia3"])
    assert found["lora"]["rank"] == 3 and found["lora"]["dropout"] == 0.1


def test_a_budget_that_is_too_short_says_what_would_do(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "shapes", SHAPES)
    with pytest.raises(UsageError, match="takes about"):
        study.study_methods(task(tmp_path), methods=["ia3"], budget=0.5)


def test_a_short_budget_gives_up_seeds_and_says_so(tmp_path, monkeypatch):
    measured = {"ia3": calibrate.Measured(calibrate.Cost(step=1.0, look=0.5, start=0.2), MEMORY)}
    after = calibrate.Closing(answers=2.0, others=2.0)
    monkeypatch.setattr(budget, "shapes", SHAPES)
    monkeypatch.setattr("luthier.flows.allotment.Allotment.measured", lambda self: (measured, after))
    report = study.study_methods(task(tmp_path), methods=["ia3"], budget=75.0, seeds=3)
    assert report["plan"]["rates"] < 6
    assert any("learning rates a method" in text for text in report["said"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("45m", 2700), ("2h", 7200), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400), ("10 min", 600)]
)
def test_times_are_read(text, seconds):
    assert study.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "45", "m", "10 days", "-5m", "0m", "1h later"])
def test_other_times_are_refused(text):
    with pytest.raises(UsageError, match="--budget"):
        study.seconds_of(text)


def test_a_stream_cannot_be_studied(tmp_path):
    write_task(tmp_path)
    rows = str(tmp_path / "rows.jsonl")
    spec = task(tmp_path, "data.stream=true", f"data.dev=[{rows}]", f"data.test=[{rows}]")
    with pytest.raises(SpecError, match=r"data\.stream"):
        study.study_methods(spec, methods=["ia3"])


def test_a_second_study_of_one_name_is_refused_while_the_first_runs(tmp_path):
    from luthier.errors import BusyError

    with store.Run(tmp_path / "runs" / "task-methods").lock(), pytest.raises(BusyError):
        study.study_methods(task(tmp_path), methods=["ia3"])


def test_find_lr_is_the_search_alone_and_a_study_uses_it(tmp_path, monkeypatch, capsys):
    spec = task(tmp_path, "method=ia3")
    found = find_lr.find_lr(spec)
    assert found["rate"] in [one["rate"] for one in found["curve"]]
    assert found["override"] == f"train.learning_rate={found['rate']:.2g}"
    again = specs.load(tmp_path / "task.yaml", [found["override"]])
    assert again.train.learning_rate == pytest.approx(found["rate"])
    find_lr.print_found(found, Console(width=120))
    assert found["override"] in capsys.readouterr().out
    counter = Counter(monkeypatch)
    study.study_methods(spec, methods=["ia3"], seeds=1)
    assert [one[4] for one in counter.trained] == [True], "only the full-length run was new"


def test_ray_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(pools.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"luthier\[ray\]"):
        study.study_methods(task(tmp_path), methods=["ia3"], ray="local")


def test_a_worker_can_run_a_trial_from_what_it_is_told(tmp_path):
    bench = Bench.open(task(tmp_path), tmp_path / "bench")
    trial = Trial(trials.resolve(bench.spec, ["ia3"])["ia3"], 1e-2, 0, 4, final=True)
    result = pools.run_alone(bench.spec.model_dump(mode="json"), trial, str(tmp_path / "bench"), 1)
    assert bench.kept(trial) == result and result["status"] == "complete"
    with bench.loaded(result) as adapted:
        assert adapted.trainable()


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.undo()
    bench = Bench.open(task(tmp_path), tmp_path / "bench")
    options = trials.resolve(bench.spec, ["lora"])["lora"]
    peak = probe.peak_memory(bench, Trial(options, 1e-3, 0, 4))
    assert 100 * 2**20 < peak < 4 * 2**30
    with pytest.raises(Exception, match="target"):
        wrong = {**options, "target_modules": ["no_such_layer"]}
        probe.peak_memory(bench, Trial(wrong, 1e-3, 0, 4))


@pytest.mark.slow
def test_trials_run_on_a_local_ray(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    folder = tmp_path / "here"
    folder.mkdir()
    here = study.study_methods(task(folder), methods=["ia3"], seeds=2)
    there_folder = tmp_path / "there"
    there_folder.mkdir()
    counter = Counter(monkeypatch)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        there = study.study_methods(task(there_folder), methods=["ia3"], seeds=2, ray="local")
    finally:
        ray.shutdown()
    assert not counter.trained, "no trial ran in this process"
    assert there["ray"] and not here["ray"]
    for one, other in zip(here["methods"], there["methods"], strict=True):
        assert one["dev_loss"] == pytest.approx(other["dev_loss"], rel=1e-3)
        assert one["learning_rate"] == other["learning_rate"]


@pytest.mark.slow
def test_a_budget_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.evaluate.speed.ROUNDS", 5)
    monkeypatch.setattr(budget, "shapes", SHAPES)
    report = study.study_methods(
        task(tmp_path, "train.max_steps=60", "train.epochs=20"), methods=["lora", "ia3"], budget=60.0
    )
    assert report["seconds"] <= 1.15 * 60
