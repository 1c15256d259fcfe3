"""The task YAML: strict, forgiving about names people know, and every fault told at once with its place."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import lined, registry, spec
from luthier.errors import SpecError, UsageError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(
    path
    for folder in ("demo", "examples", "bench", "docs", "recipes")
    for path in (ROOT / folder).rglob("*.yaml")
    if "\nmodel:" in "\n" + path.read_text("utf-8")
)
LEAST = "model: tiny\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def load(tmp_path):
    """Load YAML text as `task.yaml`."""

    def load(text: str, *overrides: str) -> spec.RunSpec:
        path = tmp_path / "task.yaml"
        path.write_text(text, "utf-8")
        return spec.load(path, overrides)

    return load


def faults_of(load, text: str, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(text, *overrides)
    return [str(fault) for fault in caught.value.faults]


def test_the_least_task_gets_every_default(load, tmp_path):
    task = load(LEAST)
    assert task.model.name == "tiny"
    assert task.data.train == [str(tmp_path / "rows.jsonl")], "paths are relative to the YAML"
    assert task.template == {"name": "chat"} and task.method == {"name": "lora"} and task.objective == {"name": "sft"}
    assert task.name == "task"


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("2E-4", 2e-4), (".001", 1e-3), ("0.5", 0.5), ("+1e-3", 1e-3)],
)
def test_numbers_are_numbers(load, written, number):
    """YAML 1.1 reads 1e-3 as text, and a run of that would train at another rate or not at all."""
    assert load(LEAST + f"train: {{learning_rate: {written}}}\n").train.learning_rate == number


def test_words_are_words(load):
    task = load(LEAST.replace("rows.jsonl}", "rows.jsonl, tags: [no, yes, on]}"))
    assert task.data.tags == ["no", "yes", "on"]


@pytest.mark.parametrize(
    ("written", "place", "value"),
    [
        ("learning_rate: 3.0e-4", "train.learning_rate", 3e-4),
        ("lr: 3e-4", "train.learning_rate", 3e-4),
        ("num_train_epochs: 2", "train.epochs", 2),
        ("micro_batch_size: 4", "train.batch_size", 4),
        ("warmup_ratio: 0.1", "train.warmup", 0.1),
        ("cutoff_len: 512", "data.max_length", 512),
        ("val_set_size: 0.2", "data.dev", 0.2),
        ("lora_r: 8", "method.rank", 8),
        ("lora_alpha: 64", "method.alpha", 64),
        ("gradient_checkpointing: true", "train.checkpointing", True),
        ("report_to: [tensorboard]", "train.report_to", ["tensorboard"]),
        ("finetuning_type: ia3", "method.name", "ia3"),
        ("template: plain", "template.name", "plain"),
        ("method: ia3", "method.name", "ia3"),
    ],
)
def test_familiar_names_mean_what_they_meant(load, written, place, value):
    found = load(LEAST + written + "\n").model_dump()
    for part in place.split("."):
        found = found[part]
    assert found == value


def test_every_alias_leads_somewhere():
    for alias, target in spec.ALIASES.items():
        head, _, rest = target.partition(".")
        assert head in spec.RunSpec.model_fields, alias
        if head not in spec.SHELF_OF and rest:
            assert rest in spec._fields_at([head]), alias
        assert alias == target or alias not in spec.RunSpec.model_fields, f"{alias} is a setting of our own"


def test_a_shorthand_and_its_settings_join(load):
    assert load(LEAST + "method: lora\nlora_r: 8\n").method == {"name": "lora", "rank": 8}
    assert load(LEAST + "lora_r: 8\nfinetuning_type: lora\n").method == {"name": "lora", "rank": 8}


def test_saying_a_thing_twice_is_a_fault(load):
    faults = faults_of(load, LEAST + "train: {learning_rate: 1e-3}\nlearning_rate: 2e-3\n")
    assert len(faults) == 1 and "train.learning_rate" in faults[0] and "keep one" in faults[0]
    with pytest.raises(SpecError, match="stands twice"):
        load(LEAST + "model: other\n")


def test_overrides_win_and_open_shorthands(load):
    task = load(
        LEAST + "method: lora\ntrain: {epochs: 1}\n", "method.rank=32", "train.epochs=2", "lr=1e-4", "name=other"
    )
    assert task.method == {"name": "lora", "rank": 32}
    assert (task.train.epochs, task.train.learning_rate, task.name) == (2, 1e-4, "other")
    assert load(LEAST, "data.test=[a.jsonl, b.jsonl]").data.test[1].endswith("b.jsonl")
    assert load(LEAST, "method={name: lora, rank: 4}").method["rank"] == 4


@pytest.mark.parametrize("override", ["rank", "=3", "train.epochs=[", "train.epochs.x=1"])
def test_an_override_that_is_none_is_a_fault(load, override):
    assert faults_of(load, LEAST, override)


def test_all_faults_are_told_at_once_with_line_and_suggestion(load):
    text = """\
model: tiny
data:
  train: rows.jsonl
  tset: 0.2
  on_bad: maybe
templte: chat
method: {name: lora, rnk: 8}
train:
  epochs: -1
  learning_rate: fast
evaluate: {primary: exat, also: [rogue]}
"""
    faults = faults_of(load, text, "train.batchsize=3")
    wanted = {
        "task.yaml:4: data.tset": "did you mean 'test'",
        "task.yaml:5: data.on_bad": "'error' or 'skip'",
        "task.yaml:6: templte": "did you mean 'template'",
        "task.yaml:7: method.rnk": "did you mean 'rank'",
        "task.yaml:9: train.epochs": "greater than 0",
        "task.yaml:10: train.learning_rate": "number",
        "task.yaml:11: evaluate.primary": "did you mean 'exact'",
        "task.yaml:11: evaluate.also": "did you mean 'rouge'",
        "train.batchsize": "did you mean 'batch_size'",
    }
    for place, remedy in wanted.items():
        told = [fault for fault in faults if place in fault]
        assert len(told) == 1, (place, faults)
        assert remedy in told[0], told[0]
    assert len(faults) == len(wanted)


def test_what_is_missing_is_said_with_what_it_is(load):
    faults = faults_of(load, "train: {epochs: 1}\n")
    assert any("model: is missing" in fault for fault in faults)
    assert any("data: is missing" in fault for fault in faults)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("data: {train: a.jsonl, stream: true}", "train.max_steps"),
        ("data: {train: a.jsonl, stream: true, dev: b.jsonl, test: c.jsonl}", "train.max_steps"),
        ("data: {train: a.jsonl, stream: true, dev: b.jsonl}\ntrain: {max_steps: 5}", "data.dev"),
        ("data: {train: a.jsonl, dev: 0.5, test: 0.5}", "data.test"),
        ("data: {train: a.jsonl, format: qa, columns: {prompt: a, answer: b}}", "data.columns"),
        ("data: {train: a.jsonl, test: 1.5}", "data.test"),
        ("data: {train: []}", "data.train"),
        ("data: {train: a.jsonl}\nname: ../evil", "name"),
        ("data: {train: a.jsonl}\nmethod: {name: lora, rank: 0}", "method.rank"),
        ("data: {train: a.jsonl}\nmethod: lroa", "method.name"),
    ],
)
def test_what_cannot_stand_is_refused(load, text, place):
    assert any(place in fault for fault in faults_of(load, f"model: tiny\n{text}\n"))


def test_paths_are_relative_to_the_yaml_and_hub_ids_stay(load, tmp_path):
    text = "model: {}\ndata: {{train: [sub/a.jsonl, /abs/b.jsonl], test: ~/c.jsonl}}\ntemplate: own.jinja\n"
    task = load(text.format("./base"))
    assert task.model.name == str(tmp_path / "base")
    assert task.data.train == [str(tmp_path / "sub" / "a.jsonl"), "/abs/b.jsonl"]
    assert task.data.test == [str(Path("~/c.jsonl").expanduser())]
    assert task.template == {"name": "jinja", "path": str(tmp_path / "own.jinja")}
    assert load(text.format("org/name")).model.name == "org/name"
    assert load(text.format("weights.gguf")).model.name == str(tmp_path / "weights.gguf")


@pytest.mark.parametrize(
    "text", ["- a list\n", "just text\n", "", "model: [\n", "model: !!python/object:os.system x\n"]
)
def test_what_is_no_mapping_is_refused_in_words(load, text):
    with pytest.raises(SpecError):
        load(text)


def test_a_missing_file_says_how_to_begin(tmp_path):
    with pytest.raises(UsageError, match="luthier init"):
        spec.load(tmp_path / "nothing.yaml")


specs = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["tiny", "org/name", {"name": "tiny", "dtype": "float32"}]),
        "data": st.fixed_dictionaries(
            {"train": st.just(["/a.jsonl"]), "dev": st.floats(0, 0.4)},
            optional={
                "system": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
                "columns": st.just({"prompt": "问", "answer": "答"}),
                "truncate": st.sampled_from(["error", "left", "right", "drop"]),
                "max_length": st.none() | st.integers(8, 4096),
            },
        ),
    },
    optional={
        "method": st.sampled_from(["lora", "ia3", {"name": "lora", "rank": 4}]),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": st.none() | st.floats(1e-7, 0.9),
                "epochs": st.floats(0.1, 100),
                "seed": st.integers(0, 99),
            },
        ),
        "evaluate": st.fixed_dictionaries({"primary": st.sampled_from(registry.names("scorers"))}),
        "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
    },
)


@settings(max_examples=80, deadline=None)
@given(specs)
def test_dump_and_load_are_inverse(tmp_path_factory, tree):
    built = spec.build(tree)
    path = tmp_path_factory.mktemp("spec") / "run.yaml"
    path.write_text(spec.dump(built), "utf-8")
    again = spec.load(path)
    built.name = built.name or "run"
    assert again == spec.resolve_paths(built, path.parent)


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029", "é\x85\n", "ordinary é"])
def test_what_yaml_takes_for_a_line_break_is_kept(tmp_path, text):
    built = spec.build({"model": "tiny", "name": "t", "data": {"train": ["a"], "system": text}})
    (tmp_path / "run.yaml").write_text(spec.dump(built), "utf-8")
    assert spec.load(tmp_path / "run.yaml").data.system == text


@cache
def schema_check() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(spec.json_schema())


@settings(max_examples=80, deadline=None)
@given(specs)
def test_what_loads_fits_the_schema(tree):
    spec.build(tree)
    schema_check().validate(tree)


def test_the_schema_is_a_schema_and_refuses_what_load_refuses():
    check = schema_check()
    check.check_schema(check.schema)
    for wrong in ({"modell": "tiny"}, {"method": {"name": "lora", "rnk": 3}}, {"train": {"epochs": 0}}):
        tree = {"model": "tiny", "data": {"train": "a.jsonl"}, **wrong}
        assert list(check.iter_errors(tree)), wrong
        with pytest.raises(SpecError):
            spec.build(tree)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_shipped_task_loads_and_fits_the_schema(path):
    spec.load(path)
    tree = yaml.load(path.read_text("utf-8"), lined.Loader)
    schema_check().validate(tree)


def test_there_are_shipped_tasks():
    assert ROOT / "demo" / "task.yaml" in SHIPPED


def table_line(name: str, setting) -> str:
    """The line of docs/train.md for a setting."""
    default = "required" if setting.is_required() else setting.get_default(call_default_factory=True)
    shown = str(list(default)) if isinstance(default, tuple) else str(default)
    shown = {"None": "—", "": "—", "True": "true", "False": "false"}.get(shown, shown)
    if get_origin(setting.annotation) is Literal:
        shown += f" (of {', '.join(map(str, get_args(setting.annotation)))})"
    return f"| `{name}` | {shown} | {setting.description} |"


def test_the_page_on_training_tells_every_setting_as_it_is():
    told = (ROOT / "docs" / "train.md").read_text("utf-8").splitlines()
    wanted = [
        table_line(f"{part}.{name}", setting)
        for part in ("model", "quantize", "data", "train", "evaluate")
        for name, setting in spec._fields_at([part]).items()
    ]
    wanted += [table_line(name, spec.RunSpec.model_fields[name]) for name in ("name", "runs")]
    missing = [line for line in wanted if line not in told]
    assert not missing, "docs/train.md lacks:\n" + "\n".join(missing)
    for name in spec.RunSpec.model_fields:
        assert any(f"`{name}`" in line or f"`{name}." in line for line in told), name
