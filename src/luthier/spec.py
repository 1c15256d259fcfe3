"""What a user may write: one strict YAML, overrides `a.b=c`, familiar aliases, all faults at once, a JSON Schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from luthier import familiar, lined, registry
from luthier.errors import Fault, SpecError, UsageError
from luthier.familiar import ALIASES


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelSpec(_Part):
    """Which base model, and how it is loaded."""

    name: str = Field(description="catalog name, hub id, local folder or .gguf file")
    revision: str | None = Field(None, description="hub revision (a commit is exact)")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto", description="auto: bfloat16 where this machine has it fast, else float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0, mps")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; off unless you say so")


class QuantizeSpec(_Part):
    """How the matrices of the frozen base are kept. Embeddings, norms and the head keep `model.dtype`."""

    name: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="nf4: 4 bits at a normal curve's quantiles; fp4: 4-bit floats; int8: 8 bits a weight"
    )
    double: bool = Field(True, description="quantise nf4's and fp4's constants too: 4.127 bits a weight, not 4.5")
    block: Literal[64, 32, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="weights of nf4 and fp4 that share one constant"
    )
    compute: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto", description="number format of the products; auto: the model's"
    )

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in (kinds := ("none", "nf4", "fp4", "int8")):
            raise ValueError(f"no quantisation is called '{value}': {registry.suggestion(value, kinds)}")
        return value


class DataSpec(_Part):
    """Where the rows are and how they are read and split. Paths are relative to the YAML."""

    train: list[str] = Field(min_length=1, description="files to learn from")
    dev: float | list[str] = Field(0.15, description="share of train, or files: steers training and error browsing")
    test: float | list[str] = Field(0.15, description="share of train, or files: judged once, at the end")
    format: str | None = Field(
        None, description="messages, sharegpt, alpaca, prompt_completion, qa, text, preference, oasst; else detected"
    )
    columns: dict[str, str] | None = Field(None, description="{prompt: my_question_column, answer: my_answer_column}")
    tags: list[str] = Field(default_factory=list, description="columns to keep for slices of the report")
    system: str | None = Field(None, description="a system message for rows that have none (the task's instruction)")
    encoding: str | None = Field(None, description="text encoding; else detected and named")
    on_bad: Literal["error", "skip"] = Field("error", description="what a bad row does")
    truncate: Literal["error", "left", "right", "drop"] = Field("error", description="what an over-long row does")
    max_length: int | None = Field(None, ge=8, description="tokens a row may have; the model's own limit by default")
    stream: bool = Field(False, description="read files larger than memory through a shuffle buffer")
    shuffle_buffer: int = Field(10_000, ge=1, description="rows held while streaming")
    seed: int = Field(0, description="of the split")

    @field_validator("train", "dev", "test", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("dev", "test")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 <= value < 0.9:
            raise ValueError("a share lies between 0 and 0.9")
        return value


class TrainSpec(_Part):
    """How the adapter learns."""

    epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimiser steps (needed with stream)")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        "adamw", description="8bit: moments in 8 bits; paged: moments may leave the GPU at peaks"
    )
    learning_rate: float | None = Field(None, gt=0, lt=1, description="peak of AdamW's; the method's own by default")
    batch_size: int = Field(16, ge=1, description="examples per optimiser step")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after warm-up")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of steps with a rising learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moment decays")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    seed: int = Field(0, description="of the order of rows, dropout and the adapter's first values")
    eval_every: int | None = Field(None, ge=1, description="steps between dev losses; twice an epoch by default")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; with each dev loss by default")
    keep: int = Field(2, ge=2, description="checkpoints kept, beside the best")
    patience: int | None = Field(4, ge=1, description="stop after so many dev losses without a new best; null: never")
    tokens_per_pack: int = Field(4096, ge=64, description="largest pack, in tokens: the memory knob")
    share_prefixes: bool = Field(True, description="compute a shared prompt once (exact); off for comparisons")
    keep_lower_states: bool = Field(True, description="compute frozen lower layers once, not in each epoch (exact)")
    checkpointing: bool = Field(False, description="recompute activations: less memory, about half slower")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores by default")
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="on this machine, each takes a share of every step; auto: one per GPU"
    )
    sharding: Literal["none", "full"] = Field("none", description="full: each process holds a part of the base (FSDP2)")
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list, description="trackers")


class EvaluateSpec(_Part):
    """How base and tuned model are judged on the held-out rows."""

    primary: str = Field("exact", description="the one metric that the verdict rests on")
    also: list[str] = Field(default_factory=list, description="further metrics, shown beside it")
    few_shot: int = Field(3, ge=0, description="examples shown to the base in its few-shot run; 0: none")
    max_new_tokens: int | None = Field(None, ge=1, description="else 1.5 times the 99th percentile of the answers")
    batch_size: int = Field(32, ge=1, description="answers generated together")
    choices: list[str] | Literal["train"] | None = Field(
        None, description="answers are chosen from these texts; train: from the training answers"
    )
    limit: int | None = Field(None, ge=1, description="judge only so many rows (chosen once, by content)")
    seed: int = Field(0, description="of the bootstrap")


class RunSpec(_Part):
    """A task: what a user asks for."""

    model: ModelSpec
    quantize: QuantizeSpec = Field(default_factory=QuantizeSpec, description="nf4, fp4, int8 or none")
    data: DataSpec
    template: dict[str, Any] = Field(
        default_factory=lambda: {"name": "chat"}, description="chat, plain, alpaca, a .jinja file"
    )
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "lora"}, description="lora, ia3 ... with its options"
    )
    objective: dict[str, Any] = Field(default_factory=lambda: {"name": "sft"}, description="sft ... with its options")
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    name: str = Field(
        "", pattern=r"^([a-z0-9][a-z0-9._-]{0,63})?$", description="of the run; the YAML's name by default"
    )
    runs: str = Field("runs", description="the folder that holds runs")

    @field_validator("model", "quantize", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else {} if value is None else value

    @field_validator("template", "method", "objective", mode="before")
    @classmethod
    def _plugin_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": "jinja", "path": value} if value.endswith((".jinja", ".jinja2")) else {"name": value}
        return value


BREAKS = {"\x85", "\u2028", "\u2029"}  # line breaks to YAML: written unescaped they would be lost
SHELF_OF = {"template": "templates", "method": "methods", "objective": "objectives"}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a task YAML and apply `a.b=c` overrides; raise SpecError with every fault, each with its line."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            "there is no such task file", where=str(path), remedy="`luthier init DIR --data FILE` writes one"
        )
    text = path.read_text("utf-8-sig")
    written, lines = lined.parse(text, str(path))
    tree, faults = _resolve_aliases(written, lines, str(path))
    for override in overrides:
        faults += override_with(tree, override)
    spec = build(tree, str(path), lines, faults)
    if not spec.name:
        spec.name = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-.") or "run"
    return resolve_paths(spec, path.parent)


def build(
    tree: Mapping[str, Any], where: str = "", lines: Mapping[str, int] | None = None, faults: Sequence[Fault] = ()
) -> RunSpec:
    """Validate a plain dictionary; raise SpecError with all faults, in the order of the file."""
    found = list(faults)
    spec = None
    try:
        spec = RunSpec.model_validate(dict(tree))
    except ValidationError as error:
        found += _schema_faults(error)
    parts = {key: tree.get(key) for key in SHELF_OF}
    for key, value in parts.items():
        value = RunSpec._plugin_by_name(value)
        if isinstance(value, Mapping):
            found += registry.check(SHELF_OF[key], value, key)
    evaluate = tree.get("evaluate")
    if isinstance(evaluate, Mapping):
        found += _scorer_faults(evaluate)
    if spec is not None and not found:
        found += _combinations(spec)
    if found:
        placed = [_placed(fault, where, lines or {}) for fault in found]
        raise SpecError(f"{where or 'the task'}: {len(placed)} thing(s) to mend", faults=placed)
    assert spec is not None
    return spec


def resolve_paths(spec: RunSpec, folder: Path) -> RunSpec:
    """Make paths absolute: data and templates are relative to the YAML, hub ids stay as they are."""

    def absolute(name: str) -> str:
        return name if "://" in name else str((folder / Path(name).expanduser()).resolve())

    spec = spec.model_copy(deep=True)
    spec.data.train = [absolute(name) for name in spec.data.train]
    for key in ("dev", "test"):
        value = getattr(spec.data, key)
        if isinstance(value, list):
            setattr(spec.data, key, [absolute(name) for name in value])
    if "path" in spec.template:
        spec.template = {**spec.template, "path": absolute(spec.template["path"])}
    if spec.model.name.startswith((".", "~", "/")) or spec.model.name.endswith(".gguf"):
        spec.model.name = absolute(spec.model.name)
    return spec


def dump(spec: RunSpec) -> str:
    """The resolved spec as YAML, every default filled in; `load` reads it back to an equal spec."""
    tree = spec.model_dump(mode="json")
    plain = BREAKS.isdisjoint(json.dumps(tree, ensure_ascii=False))
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=plain))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the task YAML for editors, with the options of every plug-in."""
    schema = RunSpec.model_json_schema()
    for key, shelf in SHELF_OF.items():
        choices: list[dict[str, Any]] = [{"type": "string"}]
        for name in registry.names(shelf):
            options = registry.find(shelf, name).Options.model_json_schema()
            properties = {"name": {"const": name}, **options.get("properties", {})}
            required = ["name", *options.get("required", [])]
            choices.append(
                {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
            )
        schema["properties"][key] = {"description": schema["properties"][key].get("description", ""), "anyOf": choices}
    schema["$defs"]["ModelSpec"] = {"anyOf": [{"type": "string"}, schema["$defs"]["ModelSpec"]]}
    quantize = schema["$defs"]["QuantizeSpec"]
    schema["$defs"]["QuantizeSpec"] = {"anyOf": [quantize["properties"]["name"], quantize]}
    schema["$defs"]["DataSpec"]["properties"]["train"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
    }
    for key in ("dev", "test"):
        schema["$defs"]["DataSpec"]["properties"][key]["anyOf"].append({"type": "string"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "luthier task", **schema}


def _resolve_aliases(tree: Mapping[str, Any], lines: dict[str, int], where: str) -> tuple[dict[str, Any], list[Fault]]:
    result: dict[str, Any] = {}
    tree, faults = familiar.translate(tree)
    for key, value in sorted(tree.items(), key=lambda item: str(item[0]) in ALIASES):  # our own keys first
        target = ALIASES.get(str(key), str(key))
        if target != key:
            lines[target] = lines.get(str(key), 0)
        faults += _place(result, target, value, str(key))
    return result, faults


def override_with(tree: dict[str, Any], text: str) -> list[Fault]:
    """Write one `a.b=c` into a tree of settings; the faults of doing so."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return [Fault(text, "is not a setting", "write key.subkey=value")]
    try:
        value = yaml.load(raw, lined.Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return [Fault(text, "has a value that is not YAML", "quote it")]
    meant, faults = familiar.translate({key: value})
    for said, value in meant.items():
        faults += _place(tree, ALIASES.get(said, said), value, said, replace=True)
    return faults


def _place(tree: dict[str, Any], target: str, value: Any, said: str, replace: bool = False) -> list[Fault]:
    """Set `a.b` in a nested dictionary; a shorthand such as `method: lora` opens up into `{name: lora}`."""
    *parents, last = target.split(".")
    here = tree
    for part in parents:
        inner = here.get(part)
        if isinstance(inner, str):
            inner = {"name": inner}
        elif inner is None:
            inner = {"name": "lora"} if part == "method" else {}
        if not isinstance(inner, dict):
            return [Fault(said, f"cannot be set: '{part}' is not a group of settings")]
        here[part] = inner
        here = inner
    if last in here and not replace:
        if isinstance(here[last], dict) and isinstance(value, str):
            here[last].setdefault("name", value)
            return []
        return [Fault(said, f"says again what '{target}' says", f"keep one of '{said}' and '{target}'")]
    here[last] = value
    return []


def _schema_faults(error: ValidationError) -> list[Fault]:
    faults = []
    for item in error.errors():
        path = [str(part) for part in item["loc"] if not str(part).startswith(("list[", "function-", "float"))]
        fields = _fields_at(path[:-1])
        name = ".".join(path)
        if item["type"] == "extra_forbidden":
            known = [*fields, *(ALIASES if len(path) == 1 else ())]
            near = registry.suggestion(path[-1], fields) if len(path) > 1 else _near(path[-1], known, fields)
            faults.append(Fault(name, "is not a known setting", near))
        elif item["type"] == "missing":
            description = fields[path[-1]].description if path[-1] in fields else ""
            faults.append(Fault(name, "is missing", description or ""))
        else:
            faults.append(Fault(name, f"{item['msg']} (got {item.get('input')!r})"))
    return faults


def _near(name: str, known: Sequence[str], fields: Mapping[str, Any]) -> str:
    return registry.suggestion(name, known).split("known:")[0] + f"known: {', '.join(fields)}"


def _fields_at(path: Sequence[str]) -> Mapping[str, Any]:
    model: Any = RunSpec
    for part in path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return {}
        model = field.annotation
    return dict(model.model_fields) if hasattr(model, "model_fields") else {}


def _scorer_faults(evaluate: Mapping[str, Any]) -> list[Fault]:
    known = registry.names("scorers")
    also = evaluate.get("also") if isinstance(evaluate.get("also"), list) else []
    asked = [("evaluate.primary", evaluate.get("primary", "exact")), *(("evaluate.also", name) for name in also or [])]
    return [
        Fault(where, f"no scorer is called '{name}'", registry.suggestion(str(name), known))
        for where, name in asked
        if isinstance(name, str) and name not in known
    ]


def _combinations(spec: RunSpec) -> list[Fault]:
    """Settings that are each fine and cannot stand together."""
    faults = []
    if spec.data.stream and spec.train.max_steps is None:
        remedy = "the length of a stream is not known before"
        faults.append(Fault("train.max_steps", "is needed with data.stream", remedy))
    if spec.data.stream and not (isinstance(spec.data.dev, list) and isinstance(spec.data.test, list)):
        remedy = "a stream is not split: name dev and test files"
        faults.append(Fault("data.dev", "must be files with data.stream", remedy))
    shares = [value for value in (spec.data.dev, spec.data.test) if isinstance(value, float)]
    if sum(shares) >= 0.9:
        faults.append(Fault("data.test", "leaves too little to learn from", "dev and test together below 0.9"))
    if spec.quantize.block != 64 and spec.quantize.name not in ("nf4", "fp4"):
        faults.append(Fault("quantize.block", "is for nf4 and fp4", "int8 has one constant for each row of a matrix"))
    if spec.train.sharding == "full" and spec.quantize.name != "none":
        faults.append(
            Fault("train.sharding", "cannot stand with quantize", "a 4-bit base is small: train.sharding: none")
        )
    if spec.data.format and spec.data.columns:
        faults.append(Fault("data.columns", "cannot stand with data.format", "columns name a format of their own"))
    return faults


def _placed(fault: Fault, where: str, lines: Mapping[str, int]) -> Fault:
    """Add the line of the nearest key that stands in the file."""
    path = fault.where
    while path and path not in lines:
        path = path.rpartition(".")[0]
    place = f"{where}:{lines[path]}: {fault.where}" if path else f"{where}: {fault.where}" if where else fault.where
    return Fault(place, fault.what, fault.remedy)
