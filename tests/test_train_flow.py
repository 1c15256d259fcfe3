"""The main job on the tiny model: from a YAML and a file of rows to a measured adapter, and what can go wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import luthier
from luthier import store
from luthier.errors import CheckpointError, DataError, LuthierError, SpecError, UsageError
from luthier.flows.export import export
from luthier.hub import cards

COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("cup", "door", "shoe", "lamp", "chair", "bag", "hat", "box", "pen", "key")


def write_task(folder: Path, rows: int = 60, **changes: str) -> Path:
    """A task of two-field JSON answers and its YAML; overrides come as YAML text by dotted key."""
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for index in range(rows):
            colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
            noise = " ".join(
                rng.choice(["please", "now", "well", "so", "and", "then"]) for _ in range(rng.randrange(1, 9))
            )
            question = f"{noise} I saw number {index * 7919 % 1000} a {colour} {thing}"
            answer = json.dumps({"colour": colour, "thing": thing})
            row = [
                {"role": "system", "content": "Say colour and thing as JSON."},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": row}) + "\n")
    settings = {
        "train.epochs": "2", "train.batch_size": "8", "train.learning_rate": "1.0e-2",
        "evaluate.max_new_tokens": "24", "evaluate.few_shot": "2", **changes,
    }  # fmt: skip
    lines = ["model: tiny", "data: {train: rows.jsonl, dev: 0.2, test: 0.2}", f"runs: {folder / 'runs'}"]
    for group in ("train", "evaluate", "method"):
        inner = [f"{k.split('.')[1]}: {v}" for k, v in settings.items() if k.startswith(group)]
        if group == "evaluate":
            inner += ["primary: json_fields", "also: [exact]"]
        if group == "method":
            inner = ["name: lora", "dropout: 0.1", *inner]
        lines.append(f"{group}: {{{', '.join(inner)}}}")
    path = folder / "task.yaml"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    events = []
    report = luthier.train(write_task(folder), on_event=events.append)
    return folder, report, events


def test_a_run_leaves_everything_it_promises(finished):
    folder, report, events = finished
    run = store.open_run(folder / "runs" / "task")
    for path in (run.spec, run.record, run.steps, run.split, run.report, run.html):
        assert path.is_file(), path
    assert {"adapter_config.json", "adapter_model.safetensors", cards.CARD, "README.md", "tokenizer.json"} <= {
        path.name for path in run.adapter.iterdir()
    }
    primary = report["primary"]
    assert {"metric", "base", "tuned", "difference", "low", "high", "p_value", "n"} <= primary.keys()
    assert primary["low"] <= primary["difference"] <= primary["high"]
    assert set(report["systems"]) == {"base", "base_few_shot", "tuned"}
    assert sum(report["transitions"][cell] for cell in ("fixed", "broken", "kept", "stuck")) == primary["n"]
    assert report["smallest_detectable_gain"] > 0
    assert "guards" in report
    assert json.loads(run.report.read_text("utf-8"))["primary"]["tuned"] == primary["tuned"]
    assert len(store.read_jsonl(run.steps)) == store.read_json(run.record)["training"]["steps"]
    assert {type(event).__name__ for event in events} >= {"Stage", "Progress", "Answering"}
    assert report["sharing"]["tokens"] < report["sharing"]["plain_tokens"], "the instruction is shared"


def test_no_row_stands_on_two_sides(finished):
    folder, _, _ = finished
    sides = store.read_json(store.open_run(folder / "runs" / "task").split)["sides"]
    assert set(sides.values()) >= {"train", "dev", "test"}


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(finished):
    from peft import PeftModel

    from luthier.model import catalog, load

    folder, _, _ = finished
    tuned = luthier.load(folder / "runs" / "task")
    base = load.load_model(catalog.locate("tiny"), dtype=tuned.card.dtype)
    plain = PeftModel.from_pretrained(base, tuned.run.adapter, autocast_adapter_dtype=False).eval()
    ids = torch.tensor([list(tuned.prompt("I saw a red cup"))])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, tuned.model(input_ids=ids).logits)
        with tuned.adapted.disabled():
            assert not torch.equal(plain(input_ids=ids).logits, tuned.model(input_ids=ids).logits)


def test_what_is_served_is_what_was_trained(finished):
    folder, _, _ = finished
    tuned = luthier.load(folder / "runs" / "task")
    kept = json.loads((tuned.run.predictions / "test" / "tuned.jsonl").read_text("utf-8").splitlines()[0])
    assert tuned.answer(kept["question"], max_new_tokens=24) == kept["text"]


def test_export_is_proved_and_plain(finished, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _, _ = finished
    proof = export(folder / "runs" / "task", tmp_path / "merged")
    assert proof["largest_difference"] <= proof["tolerance"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tuned = luthier.load(folder / "runs" / "task")
    ids = torch.tensor([list(tuned.prompt("I saw a red cup"))])
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, tuned.model(input_ids=ids).logits, atol=1e-3)
    with pytest.raises(UsageError, match="not empty"):
        export(folder / "runs" / "task", tmp_path / "merged")


def test_a_second_run_of_the_name_is_refused_and_resume_changes_nothing(finished):
    folder, report, _ = finished
    with pytest.raises(UsageError, match="--resume"):
        luthier.train(folder / "task.yaml")
    before = store.sha256_file(folder / "runs" / "task" / "adapter" / "adapter_model.safetensors")
    again = luthier.train(folder / "task.yaml", resume=True)
    assert store.sha256_file(folder / "runs" / "task" / "adapter" / "adapter_model.safetensors") == before
    assert again["primary"]["tuned"] == report["primary"]["tuned"]


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        write_task(folder, **{"train.save_every": "2", "train.epochs": "3"})
    luthier.train(whole / "task.yaml")

    class Killed(Exception):
        pass

    def kill(event):
        if type(event).__name__ == "Progress" and event.step.index == 7:
            raise Killed

    with pytest.raises(Killed):
        luthier.train(cut / "task.yaml", on_event=kill)
    luthier.train(cut / "task.yaml", resume=True)
    names = [folder / "runs" / "task" / "adapter" / "adapter_model.safetensors" for folder in (whole, cut)]
    assert store.sha256_file(names[0]) == store.sha256_file(names[1])
    steps = [[line["loss"] for line in store.read_jsonl(f / "runs" / "task" / "steps.jsonl")] for f in (whole, cut)]
    assert steps[0] == steps[1]


def test_another_base_or_a_damaged_adapter_is_refused(finished, tmp_path):
    import shutil

    folder, _, _ = finished
    shutil.copytree(folder / "runs" / "task", tmp_path / "copy")
    run = store.open_run(tmp_path / "copy")
    weights = run.adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="adapter_model"):
        luthier.load(run.folder)
    card = cards.read(store.open_run(folder / "runs" / "task").adapter)
    with pytest.raises(CheckpointError, match="another base"):
        cards.require_base(card, "0" * 16, run.adapter)


def test_mistakes_are_listed_all_at_once(tmp_path):
    path = write_task(tmp_path)
    path.write_text(path.read_text("utf-8").replace("primary:", "primry:") + "seeed: 3\n", "utf-8")
    with pytest.raises(SpecError) as caught:
        luthier.train(path, ["method.rnk=4"])
    told = str(caught.value)
    assert "primry" in told and "did you mean 'primary'" in told and "seeed" in told and "rnk" in told
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text("utf-8") + '{"messages": 3}\nnot json\n', "utf-8")
    write_task_lines = len(rows.read_text("utf-8").splitlines())
    path = tmp_path / "task.yaml"
    path.write_text(f"model: tiny\ndata: {{train: rows.jsonl}}\nruns: {tmp_path}/runs\n", "utf-8")
    with pytest.raises(DataError) as bad:
        luthier.train(path)
    assert f"rows.jsonl:{write_task_lines}" in str(bad.value)
    assert f"rows.jsonl:{write_task_lines - 1}" in str(bad.value)
    assert not (tmp_path / "runs" / "task" / "run.yaml").exists(), "a mistake leaves no run behind"


def test_two_processes_on_one_run_are_refused(tmp_path):
    path = write_task(tmp_path)
    run = store.Run(tmp_path / "runs" / "task")
    code = f"import luthier; luthier.train({str(path)!r})"
    with run.lock():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "in use by process" in done.stderr


def test_a_method_of_another_kind_runs_the_whole_job(tmp_path):
    path = write_task(tmp_path)
    report = luthier.train(path, ["method={name: ia3}", "train.epochs=1", "evaluate.few_shot=0"])
    assert "base_few_shot" not in report["systems"]
    assert luthier.load(tmp_path / "runs" / "task").card.method["name"] == "ia3"


def test_interruption_saves_and_says_how_to_go_on(tmp_path):
    import os
    import signal

    path = write_task(tmp_path, **{"train.epochs": "4"})

    def interrupt(event):
        if type(event).__name__ == "Progress" and event.step.index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(LuthierError, match="--resume"):
        luthier.train(path, on_event=interrupt)
    assert store.read_json(tmp_path / "runs" / "task" / "record.json")["status"] == "interrupted"
    report = luthier.train(path, resume=True)
    assert report["training"]["ended"] == "complete"


def test_a_stream_is_trained_on_and_resumed(tmp_path):
    for name in ("whole", "cut"):
        folder = tmp_path / name
        folder.mkdir()
        write_task(folder, rows=80)
        lines = (folder / "rows.jsonl").read_text("utf-8").splitlines()
        for part, some in (("train", lines[:60]), ("dev", lines[60:70]), ("test", lines[70:])):
            (folder / f"{part}.jsonl").write_text("\n".join(some) + "\n", "utf-8")
    more = [
        "data={train: train.jsonl, dev: dev.jsonl, test: test.jsonl, stream: true, shuffle_buffer: 16}",
        "train.max_steps=10", "train.save_every=3", "evaluate.few_shot=0",
    ]  # fmt: skip

    class Killed(Exception):
        pass

    def kill(event):
        if type(event).__name__ == "Progress" and event.step.index == 8:
            raise Killed

    report = luthier.train(tmp_path / "whole" / "task.yaml", more)
    assert report["data"]["rows"]["train"] == "streamed"
    with pytest.raises(Killed):
        luthier.train(tmp_path / "cut" / "task.yaml", more, on_event=kill)
    luthier.train(tmp_path / "cut" / "task.yaml", more, resume=True)
    names = [tmp_path / n / "runs" / "task" / "adapter" / "adapter_model.safetensors" for n in ("whole", "cut")]
    assert store.sha256_file(names[0]) == store.sha256_file(names[1])


def test_trackers_are_told(tmp_path):
    pytest.importorskip("tensorboard")
    path = write_task(tmp_path, **{"train.epochs": "1"})
    luthier.train(path, ["train.report_to=[tensorboard]", "evaluate.few_shot=0"])
    assert list((tmp_path / "runs" / "task" / "trackers").rglob("events.out.tfevents.*"))


def test_a_finished_run_is_judged_on_other_rows(finished):
    from luthier.flows.evaluate import evaluate

    folder, report, _ = finished
    again = evaluate(folder / "runs" / "task")
    assert again["primary"]["tuned"] == report["primary"]["tuned"], "kept answers are used again"
    assert again["ledger"]["opened"] > report["ledger"]["opened"], "each look at the test rows is counted"
    other = evaluate(folder / "runs" / "task", folder / "rows.jsonl")
    assert other["primary"]["n"] == 60
    assert (folder / "runs" / "task" / "evaluations" / "rows" / "report.html").is_file()


def write_labels(folder: Path, choices: str) -> Path:
    """A task whose answers are one of four words."""
    rows = [
        {"question": f"number {n * 7919 % 1000} is a {COLOURS[n % 4]} thing", "answer": COLOURS[n % 4]}
        for n in range(48)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    lines = [
        "model: tiny", "template: plain", "data: {train: rows.jsonl, dev: 0.2, test: 0.25}", f"runs: {folder / 'runs'}",
        "train: {max_steps: 2}", f"evaluate: {{primary: exact, few_shot: 0, choices: {choices}}}",
    ]  # fmt: skip
    path = folder / "task.yaml"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("choices", ["train", "[red, green, blue, black]"])
def test_answers_are_chosen_where_the_task_has_choices(tmp_path, choices):
    luthier.train(write_labels(tmp_path, choices))
    folder = tmp_path / "runs" / "task" / "predictions" / "test"
    for system in ("base", "tuned"):
        told = [json.loads(line) for line in (folder / f"{system}.jsonl").read_text("utf-8").splitlines()]
        assert told and {one["text"] for one in told} <= set(COLOURS[:4])
        assert json.loads((folder / f"{system}.json").read_text("utf-8"))["choices"] == sorted(COLOURS[:4])


@pytest.mark.parametrize(
    ("choices", "words"), [("[red, green]", "not among the choices"), ("[red]", "1 different answers to choose from")]
)
def test_choices_that_cannot_be_are_refused_before_anything_is_computed(tmp_path, choices, words):
    with pytest.raises(SpecError, match=words) as error:
        luthier.train(write_labels(tmp_path, choices))
    assert "evaluate.choices" in str(error.value)
