"""The command line: exit codes, JSON, plain errors, and every verb on the tiny model."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from rich.console import Console

from luthier import cli, spec, store
from luthier.errors import ProofFailed, UsageError
from luthier.flows import init as init_flow
from luthier.flows import screen
from luthier.flows.events import Answering, Note, Progress, Stage
from luthier.records import Step

COLOURS, THINGS = ("red", "green", "blue", "black", "white"), ("cup", "door", "shoe", "lamp", "chair", "bag", "hat")
INSTRUCTION = "Say the colour and the thing as JSON."


def write_rows(path: Path, count: int = 60, seed: int = 0) -> Path:
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
            noise = " ".join(rng.sample(["well", "so", "please", "then", "and", "now", "yes", "hm", "look", "oh"], 5))
            question = f"{noise}, at {index * 7919 % 1000} I saw a {colour} {thing}"
            row = {"prompt": question, "answer": json.dumps({"colour": colour, "thing": thing})}
            file.write(json.dumps(row) + "\n")
    return path


def write_task(folder: Path, extra: str = "", **train: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl")
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, **train}
    path = folder / "task.yaml"
    path.write_text(
        f"model: tiny\nruns: {json.dumps(str(folder / 'runs'))}\n"
        f"data: {{train: rows.jsonl, dev: 0.2, test: 0.25, system: {INSTRUCTION}{extra}}}\n"
        f"train: {json.dumps(settings)}\n"
        "evaluate: {primary: json_fields, also: [exact], few_shot: 0, max_new_tokens: 16}\n",
        "utf-8",
    )
    return path


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize("command", [(), ("train",), ("check",), ("models",), ("models", "pull"), ("export",)])
def test_help_is_fine(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0 and "Usage:" in out


def test_no_argument_is_a_call_for_help(run):
    code, out, _ = run()
    assert code == 0 and "train" in out and "Exit codes" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian", "x.yaml"], "Did you mean 'train'"),
        (["train"], "Missing argument"),
        (["train", "x.yaml", "--resum"], "--resume"),
        (["check", "absent.yaml"], "luthier init"),
        (["report", "absent"], "no run at 'absent'"),
        (["evaluate", "absent"], "no run at 'absent'"),
        (["compare", "absent", "other"], "no run at 'absent'"),
        (["generate", "absent"], "nothing to answer"),
        (["generate", "absent", "--prompt", "hello"], "no run at 'absent'"),
        (["generate", "absent", "--file", "absent.txt"], "absent.txt"),
        (["chat", "absent"], "no run at 'absent'"),
        (["export", "absent", "--merged", "folder"], "no run at 'absent'"),
        (["models", "path", "smolm2-135m"], "did you mean 'smollm2-135m'"),
        (["init", "folder", "--data", "absent.jsonl"], "no such file"),
    ],
)
def test_wrong_use_ends_with_2_and_says_what_to_do(run, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert out == ""
    assert told in err
    assert code == (1 if arguments[-1] == "absent.txt" else 2)


def test_errors_are_json_on_stdout_where_json_is_asked_for(run, tmp_path):
    path = write_task(tmp_path)
    path.write_text(path.read_text("utf-8").replace("epochs", "epocs"), "utf-8")
    code, out, err = run("check", path, "--json")
    error = json.loads(out)["error"]
    assert code == error["exit_code"] == 2
    assert error["faults"][0]["where"].endswith(":4: train.epocs") and "epochs" in error["faults"][0]["remedy"]
    assert "epocs" in err
    assert json.loads(run("trian", "--json")[1])["error"]["exit_code"] == 2


def test_bad_rows_end_with_2_and_are_all_listed(run, tmp_path):
    path = write_task(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text("utf-8") + 'not json\n{"prompt": "a"}\n{"prompt": "b", "answer": null}\n', "utf-8")
    for verb in ("check", "show", "train"):
        code, out, _ = run(verb, path, "--json")
        places = [fault["where"] for fault in json.loads(out)["error"]["faults"]]
        assert code == 2
        assert all(any(place.endswith(f"rows.jsonl:{line}") for place in places) for line in (61, 62, 63)), places


def test_a_row_that_cannot_be_rendered_is_a_fault_or_skipped_and_counted(run, tmp_path):
    path = write_task(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text("utf-8") + '{"prompt": "an empty answer to a question", "answer": " "}\n', "utf-8")
    code, out, _ = run("check", path, "--json")
    assert code == 2 and any("rows.jsonl:61" in place for f in json.loads(out)["findings"] for place in f["origins"])
    code, out, _ = run("check", path, "data.on_bad=skip", "--json")
    told = json.loads(out)
    assert code == 0 and [bad["where"] for bad in told["bad_rows"]] == ["rows.jsonl:61"]
    assert sum(facts["rows"] for facts in told["sides"].values()) == 60

    from luthier.flows.prepare import prepare

    prepared = prepare(spec.load(path, ["data.on_bad=skip"]))
    assert prepared.skipped == 1 and prepared.facts()["bad_rows_skipped"] == 1


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UsageError("no"), 2, "luthier: no"),
        (ProofFailed("they disagree"), 3, "they disagree"),
        (ValueError("odd"), 1, "unexpected ValueError: odd -> LUTHIER_DEBUG=1"),
        (MemoryError(), 1, "train.tokens_per_pack"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_every_end_has_its_code_and_one_sentence(run, monkeypatch, error, code, told):
    def fail(folder):
        raise error

    monkeypatch.setattr("luthier.flows.runs.table", fail)
    ended, out, err = run("runs")
    assert (ended, out) == (code, "")
    assert told in err and len(err.splitlines()) == 1


def test_a_traceback_is_there_for_those_who_ask(monkeypatch, capsys):
    monkeypatch.setenv("LUTHIER_DEBUG", "1")
    with pytest.raises(SystemExit):
        cli.main(["report", "absent"])
    assert "Traceback" in capsys.readouterr().err


def test_what_a_terminal_would_act_on_is_spelt_out(run, tmp_path):
    code, _, err = run("check", tmp_path / "a\x1b[2Jb.yaml")
    assert code == 2 and "\x1b" not in err and "\\x1b[2Jb.yaml" in err


# ---------------------------------------------------------------- looking


def test_check_tells_rows_sharing_and_a_forecast(run, tmp_path):
    code, out, _ = run("check", write_task(tmp_path), "--json")
    told = json.loads(out)
    assert code == 0 and told["ok"]
    assert {side: facts["rows"] > 0 for side, facts in told["sides"].items()} == dict.fromkeys(
        ("train", "dev", "test"), True
    )
    assert sum(facts["rows"] for facts in told["sides"].values()) == 60
    assert 0 < told["mask"]["share"] < 0.5
    assert told["sharing"]["factor"] > 1.3, "the instruction is shared"
    forecast = told["forecast"]
    assert 0 < forecast["seconds_low"] < forecast["seconds"] < forecast["seconds_high"]
    assert forecast["steps"] == -(-told["sides"]["train"]["rows"] // 8)
    assert 0 < forecast["trainable"] < forecast["parameters"]


def test_check_is_for_people_too(run, tmp_path):
    code, out, _ = run("check", write_task(tmp_path))
    assert code == 0 and "Forecast:" in out and "rows.jsonl" in out


def test_a_leak_ends_check_with_2_and_training_leaves_it_out(run, tmp_path):
    path = write_task(tmp_path)
    first = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()[:12]
    (tmp_path / "test.jsonl").write_text("\n".join(first) + "\n", "utf-8")
    code, out, _ = run("check", path, "data.test=test.jsonl", "--json")
    told = json.loads(out)
    leak = next(finding for finding in told["findings"] if finding["code"] == "leak")
    assert code == 2 and not told["ok"] and told["forecast"] is None
    assert leak["count"] >= 6 and all("rows.jsonl:" in told for told in leak["origins"])

    from luthier.flows.prepare import prepare

    prepared = prepare(spec.load(path, [f"data.test={tmp_path / 'test.jsonl'}"]))
    assert prepared.leaks_removed == leak["count"]
    asked = {example.question for example in prepared.train}
    assert not asked & {example.question for example in prepared.test}


def test_an_over_long_row_is_a_fault_that_names_it(run, tmp_path):
    path = write_task(tmp_path)
    rows = tmp_path / "rows.jsonl"
    long = json.dumps({"prompt": "word " * 1500, "answer": '{"colour": "red", "thing": "cup"}'})
    rows.write_text(rows.read_text("utf-8") + long + "\n", "utf-8")
    code, out, _ = run("check", path, "--json")
    finding = next(f for f in json.loads(out)["findings"] if f["code"] == "over_long")
    assert code == 2 and "rows.jsonl:61" in finding["origins"][0]
    code, out, _ = run("check", path, "data.truncate=left", "--json")
    assert code == 0 and json.loads(out)["forecast"]


def test_a_dry_run_checks_and_leaves_no_run(run, tmp_path):
    code, out, _ = run("train", write_task(tmp_path), "--dry-run", "--json")
    assert code == 0 and json.loads(out)["ok"]
    assert not (tmp_path / "runs").exists()


def test_show_learns_answers_and_nothing_else(run, tmp_path):
    code, out, _ = run("show", write_task(tmp_path), "--rows", 2, "--side", "test", "--json")
    told = json.loads(out)
    assert code == 0 and told["side"] == "test" and len(told["rows"]) == 2
    for row in told["rows"]:
        assert INSTRUCTION in row["prompt"] and row["prompt"].endswith("<|im_start|>assistant\n")
        assert json.loads(row["answer"].removesuffix("<|im_end|>"))
        assert row["weights"] == [0.0] * row["prompt_length"] + [1.0] * (len(row["ids"]) - row["prompt_length"])
    assert told["hidden_system"] is None and told["sharing"]["factor"] > 1


def test_show_tells_of_a_hidden_system_message(run, tmp_path):
    path = write_task(tmp_path)
    path.write_text(path.read_text("utf-8").replace(f", system: {INSTRUCTION}", ""), "utf-8")
    assert "named Tiny" in json.loads(run("show", path, "--json")[1])["hidden_system"]
    assert "named Tiny" in run("show", path)[1]
    assert run("show", path, "--side", "tset")[0] == 2


def test_schema_version_models_and_doctor_speak_json(run, monkeypatch, tmp_path):
    jsonschema.Draft202012Validator.check_schema(json.loads(run("schema")[1]))
    assert json.loads(run("version", "--json")[1])["version"] in run("version")[1]
    rows = json.loads(run("models", "list", "--json")[1])
    assert {"name", "parameters", "chat", "here", "licence", "source", "note"} == rows[0].keys()
    assert "smollm2-135m" in {row["name"] for row in rows} and "smollm2-135m" in run("models", "list")[1]
    code, out, _ = run("doctor", "--json")
    items = {item["name"]: item for item in json.loads(out)}
    assert {"python", "torch", "cores", "memory", "cache", "bfloat16"} <= items.keys()
    assert code == (0 if all(item["ok"] for item in items.values()) else 1)
    monkeypatch.setattr("luthier.flows.doctor.LEAST_DISK", 1 << 60)
    assert run("doctor")[0] == 1
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    assert "secret-token" not in run("doctor")[1]


# ---------------------------------------------------------------- init


def table(path: Path, rows: list[tuple[str, str, str]], head: str, encoding: str = "utf-8") -> Path:
    lines = [head, *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


def test_init_sees_records_and_never_overwrites(run, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    code, out, _ = run("init", tmp_path / "desk", "--data", data, "--json")
    told = json.loads(out)
    assert code == 0 and told["kind"] == "records" and told["primary"] == "json_fields" and told["rows"] == 60
    before = (tmp_path / "desk" / "task.yaml").read_bytes()
    code, _, err = run("init", tmp_path / "desk", "--data", data)
    assert code == 2 and "not overwritten" in err
    assert (tmp_path / "desk" / "task.yaml").read_bytes() == before
    task = spec.load(tmp_path / "desk" / "task.yaml")
    assert task.data.train == [str(data)] and task.name == "desk"
    assert before.decode().count("#") > 8, "lines say why"


def test_init_sees_labels_guesses_columns_and_finds_the_test_file(tmp_path):
    rows = [(f"{i}", f"I want to {verb} my order number {i}", verb) for i in range(60) for verb in ("cancel", "track")]
    table(tmp_path / "mail_test.csv", rows[:40], "id,message,intent")
    told = init_flow.init(
        tmp_path / "task", table(tmp_path / "mail_train.csv", rows, "id,message,intent"), model="pythia-70m"
    )
    task = spec.load(told["task"])
    assert told["kind"] == "labels" and task.evaluate.primary == "exact"
    assert task.data.columns == {"prompt": "message", "answer": "intent"}
    assert task.data.test == [str(tmp_path / "mail_test.csv")]
    assert task.template == {"name": "plain"}, "pythia has no chat template"


def test_init_sees_chinese_prose_and_its_encoding(tmp_path):
    rows = [
        (f"{i}", f"第{i}位病人问：头痛发烧已经{i}天，应该怎么办？", "多喝水，好好休息，" * 8 + f"{i}天后复诊。")
        for i in range(40)
    ]
    told = init_flow.init(tmp_path / "task", table(tmp_path / "问答.csv", rows, "编号,question,answer", "gb18030"))
    task = spec.load(told["task"])
    assert told["encoding"] == task.data.encoding == "gb18030"
    assert task.evaluate.primary == "rouge" and task.model.name.startswith("qwen")


def test_init_sees_a_template_inside_and_bad_rows(tmp_path):
    path = tmp_path / "docs.jsonl"
    rows = [
        {
            "question": f"### Question:\nHow does number {i} of the machine work?\n\n### Answer:",
            "answer": f"It turns {i} times. " * 20,
        }
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\nbad\n", "utf-8")
    told = init_flow.init(tmp_path / "task", path)
    task = spec.load(told["task"])
    assert task.template == {"name": "raw"}
    assert told["bad_rows"] == 1 and task.data.on_bad == "skip"


@pytest.mark.parametrize("name", ["with space & more", "Ünïcode", "..hidden..", "a" * 100, "it's: {odd}"])
def test_init_writes_a_readable_yaml_whatever_the_names(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    told = init_flow.init(folder, write_rows(folder / "my: rows #1.jsonl"))
    assert Path(spec.load(told["task"]).data.train[0]).name == "my: rows #1.jsonl"
    assert yaml.safe_load(Path(told["task"]).read_text("utf-8"))["model"] == "smollm2-135m"


# ---------------------------------------------------------------- the whole job


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run trained by the command line itself, in a process of its own."""
    folder = tmp_path_factory.mktemp("job")
    path = write_task(folder)
    command = [sys.executable, "-m", "luthier", "train", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "task", json.loads(done.stdout), done.stderr


def test_train_keeps_stdout_for_the_report_and_tells_its_progress(finished):
    folder, report, err = finished
    assert report["primary"] == store.read_json(folder / "report.json")["primary"]
    assert "read the rows" in err and "step 1/" in err and "answers" in err
    assert "\x1b" not in err, "plain lines where there is no terminal"


def test_a_second_train_is_refused_and_says_how_to_go_on(run, finished):
    code, _, err = run("train", finished[0].parents[1] / "task.yaml")
    assert code == 2 and "--resume" in err and "--overwrite" in err


def test_report_prints_the_verdict(run, finished):
    folder, report, _ = finished
    code, out, _ = run("report", folder)
    assert code == 0 and " ".join(report["sentence"].split()) in " ".join(out.split()) and "report.html" in out
    assert json.loads(run("report", folder, "--json")[1])["sentence"] == report["sentence"]


def test_runs_are_listed(run, finished, tmp_path):
    folder, report, _ = finished
    rows = json.loads(run("runs", folder.parent, "--json")[1])
    assert [row["name"] for row in rows] == ["task"]
    assert rows[0]["status"] == "complete" and rows[0]["tuned"] == pytest.approx(report["primary"]["tuned"], abs=1e-4)
    assert "task" in run("runs", folder.parent)[1]
    assert "No runs" in run("runs", tmp_path)[1] and json.loads(run("runs", tmp_path, "--json")[1]) == []


def test_a_run_equals_itself(run, finished):
    folder, report, _ = finished
    code, out, _ = run("compare", folder, folder, "--json")
    told = json.loads(out)
    assert code == 0 and told["primary"]["difference"] == 0 and told["n"] == report["primary"]["n"]
    assert told["transitions"]["fixed"] == told["transitions"]["broken"] == 0
    assert told["primary"]["base"] == report["primary"]["tuned"]
    assert "task" in run("compare", folder, folder)[1]


def test_evaluate_measures_the_same_and_other_rows(run, finished, tmp_path):
    folder, report, _ = finished
    code, out, _ = run("evaluate", folder, "--json")
    assert code == 0 and json.loads(out)["primary"]["tuned"] == report["primary"]["tuned"]
    other = write_rows(tmp_path / "other.jsonl", count=10, seed=7)
    code, out, _ = run("evaluate", folder, "--data", other, "--json")
    assert code == 0 and json.loads(out)["primary"]["n"] == 10


def test_generate_answers_from_prompts_and_files(run, finished, tmp_path):
    folder, _, _ = finished
    questions = tmp_path / "questions.txt"
    questions.write_text("I saw a red cup\n\nI saw a blue door\n", "utf-8")
    code, out, _ = run(
        "generate", folder, "--file", questions, "--prompt", "I saw a hat", "--max-new-tokens", 8, "--json"
    )
    told = json.loads(out)
    assert code == 0 and [item["prompt"] for item in told] == ["I saw a hat", "I saw a red cup", "I saw a blue door"]
    alone = json.loads(run("generate", folder, "--prompt", "I saw a red cup", "--max-new-tokens", 8, "--json")[1])
    assert alone[0]["text"] == told[1]["text"], "company does not change an answer"
    base = json.loads(
        run("generate", folder, "--prompt", "I saw a red cup", "--max-new-tokens", 8, "--base", "--json")[1]
    )
    assert base[0]["text"] != told[1]["text"], "training changed something"


def test_chat_ends_with_its_input(run, finished, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("I saw a red cup\n\n"))
    code, out, _ = run("chat", finished[0], "--max-new-tokens", 4)
    assert code == 0 and out.startswith(">")


def test_chat_spells_out_what_a_terminal_would_act_on(run, finished, monkeypatch):
    from luthier.flows.answer import Tuned

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n"))
    monkeypatch.setattr(Tuned, "stream", lambda *_, **__: iter(["a\x1b[31m", "b\nc"]))
    code, out, _ = run("chat", finished[0])
    assert code == 0 and "\x1b" not in out and "a\\x1b[31mb\nc" in out


def test_export_proves_and_refuses_a_full_folder(run, finished, tmp_path):
    code, out, _ = run("export", finished[0], "--merged", tmp_path / "merged", "--json")
    assert code == 0 and json.loads(out)["largest_difference"] <= json.loads(out)["tolerance"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert run("export", finished[0], "--merged", tmp_path / "merged")[0] == 2


def test_ctrl_c_ends_with_130_and_the_run_goes_on(tmp_path):
    path = write_task(tmp_path, epochs=200)
    command = [sys.executable, "-m", "luthier", "train", str(path), "train.patience=null"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    steps = tmp_path / "runs" / "task" / "steps.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (steps.exists() and len(steps.read_bytes().splitlines()) > 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err and "--resume" in err.splitlines()[-1]
    assert 3 < len(store.read_jsonl(steps)) < 1000
    assert store.read_json(steps.with_name("record.json"))["status"] == "interrupted"


# ---------------------------------------------------------------- the screen


def step(index: int) -> Step:
    return Step(index, 0.5, 1.25, 1e-3, 0.9, 500, 1500, 40.0, 8, 0.5, 1 << 30, 0.75 if index == 2 else None)


EVENTS = [
    Stage("read the rows", "a\x1b[31mb.jsonl"), Note("odd [bold]rows[/]", "warning"), Answering("base_few_shot", 1, 2),
    Answering("base_few_shot", 2, 2), Stage("tune"), Progress(step(1), 2, 60.0), Progress(step(2), 2, 0.0),
]  # fmt: skip


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with screen.watching(Console(file=out, width=200)) as listener:
        for event in EVENTS:
            listener(event)
    lines = out.getvalue().splitlines()
    assert lines[0] == "read the rows: a\\x1b[31mb.jsonl"
    assert lines[1] == "warning: odd [bold]rows[/]"
    assert "base few shot: 2/2 answers" in lines
    assert "step 2/2  loss 1.2500  dev 0.7500  3,000 tokens/s  0 s left" in lines


def test_a_line_is_written_every_few_seconds_only():
    out = io.StringIO()
    with screen.watching(Console(file=out, width=200)) as listener:
        for index in range(2, 400):
            listener(Progress(step(index), 400, 10.0))
    assert len(out.getvalue().splitlines()) <= 3


def test_bars_on_a_terminal_pass_nothing_on_from_the_data():
    out = io.StringIO()
    with screen.watching(Console(file=out, force_terminal=True, width=160)) as listener:
        for event in EVENTS:
            listener(event)
    told = out.getvalue()
    assert "a\\x1b" in told and "odd [bold]rows[/]" in told and "3,000 tokens/s" in told
