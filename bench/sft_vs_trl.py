"""Supervised tuning side by side: luthier against TRL's SFTTrainer, same rows, same adapter, same machine, one run.

    python bench/sft_vs_trl.py --data demo --examples 64 --rounds 3 --out docs/benchmarks/demo.json

Arms, each in a fresh process per round, in alternating order:
  trl_default   SFTTrainer as installed (its own dtype, gradient checkpointing, padding)
  trl_tuned     the same tuned: this machine's fast dtype, no autocast, no checkpointing, answers only, rows grouped by
                length, fused AdamW, no pinned memory, best of the batch sizes tried
  plain         a loop that a good engineer would write: padded batches, logits at answers only
  unshared      luthier with prefix sharing off
  luthier       luthier's default path
Every arm starts from the same adapter values and sees the same token ids, `--batch` examples per optimiser step. Times
start after the first step. After training, one plain function measures every arm's loss on the same dev rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
ARMS = ("trl_default", "trl_tuned", "plain", "unshared", "luthier")
RANK, RATE = 16, 1e-3


# ---------------------------------------------------------------- rows


def rows_of(name: str) -> list[list[dict[str, str]]]:
    """Conversations (system, user, assistant) of a data set."""
    if name == "demo":
        return [json.loads(line)["messages"] for line in (ROOT / "demo" / "train.jsonl").open(encoding="utf-8")]
    if name == "lamini_docs":
        lines = (SHARED / name / "lamini_docs.jsonl").read_text("utf-8").splitlines()
        pairs = [json.loads(line) for line in lines if line.strip()]
        strip = ("### Question:\n", "\n\n### Answer:")
        return [
            _turns("", p["question"].removeprefix(strip[0]).removesuffix(strip[1]), p["answer"])
            for p in pairs
            if p["answer"]
        ]
    if name == "banking77":
        import csv

        with (SHARED / name / "train.csv").open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        labels = sorted({row["category"] for row in table})
        instruction = "Answer with the one intent that fits the customer's message. Intents: " + ", ".join(labels)
        return [_turns(instruction, row["text"], row["category"]) for row in table]
    return _snips()


def _snips() -> list[list[dict[str, str]]]:
    instruction = (
        "Turn the request into JSON with keys intent and slots. Intents: AddToPlaylist (artist, entity_name, music_item, "
        "playlist, playlist_owner), BookRestaurant (city, country, cuisine, facility, party_size_description, "
        "party_size_number, poi, restaurant_name, restaurant_type, served_dish, sort, spatial_relation, state, timeRange), "
        "GetWeather (city, condition_description, condition_temperature, country, current_location, geographic_poi, "
        "spatial_relation, state, timeRange), PlayMusic (album, artist, genre, music_item, playlist, service, sort, track, "
        "year), RateBook (best_rating, object_name, object_part_of_series_type, object_select, object_type, rating_unit, "
        "rating_value), SearchCreativeWork (object_name, object_type), SearchScreeningEvent (location_name, movie_name, "
        "movie_type, object_location_type, object_type, spatial_relation, timeRange). Slots hold the request's own words."
    )
    made = []
    for path in sorted((SHARED / "snips_nlu").glob("*/train_*_full.json")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        for intent, items in json.loads(text).items():
            for item in items:
                spans = item["data"]
                slots = {span["entity"]: span["text"] for span in spans if "entity" in span}
                answer = json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False, separators=(",", ":"))
                made.append(_turns(instruction, "".join(span["text"] for span in spans).strip(), answer))
    return made


def _turns(system: str, user: str, assistant: str) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def prepare(name: str, folder: Path, examples: int, dev: int, seed: int = 0) -> dict[str, Any]:
    """Render rows once with luthier's chat template and write the ids that every arm reads."""
    from luthier import registry
    from luthier.model import catalog
    from luthier.records import Example, Message, Origin
    from luthier.text.render import render
    from luthier.text.tokenizer import Tokenizer

    model = catalog.locate("smollm2-135m")
    tokenizer, template = Tokenizer.from_folder(model), registry.make("templates", "chat")
    table = rows_of(name)
    random.Random(seed).shuffle(table)
    chosen = []
    for turns in table[: examples + dev]:
        example = Example(tuple(Message(t["role"], t["content"]) for t in turns), Origin(name))
        row = render(example, template, tokenizer)
        assert row is not None
        chosen.append({"ids": row.ids, "prompt": row.prompt_length, "messages": turns})
    task = {"model": str(model), "train": chosen[:examples], "dev": chosen[examples:]}
    (folder / "task.json").write_text(json.dumps(task), "utf-8")
    prompts = [row["ids"][: row["prompt"]] for row in chosen]
    shared = len(os.path.commonprefix(prompts))
    lengths = [len(row["ids"]) for row in chosen]
    return {
        "rows": len(chosen), "tokens_per_row": round(statistics.mean(lengths), 1), "shared_prefix": shared,
        "answer_tokens": round(statistics.mean(len(r["ids"]) - r["prompt"] for r in chosen), 1),
        "shared_share": round(shared / statistics.mean(lengths), 3),
    }  # fmt: skip


# ---------------------------------------------------------------- one arm, in its own process


def run_arm(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and return its figures."""
    import torch

    from luthier.training import peak

    task = json.loads((folder / "task.json").read_text("utf-8"))
    torch.manual_seed(0)
    before = time.perf_counter()
    stamps, model = (_trl if arm.startswith("trl") else _ours)(arm, task, options)
    steps, batch = len(stamps) - 1, options.default_batch if arm == "trl_default" else options.batch
    seconds = stamps[-1] - stamps[0]
    most = peak.resident() / 2**20
    return {
        "arm": arm, "examples_per_second": steps * batch / seconds, "peak_mib": round(most),
        "first_step_seconds": round(stamps[0] - before, 2), "steps": steps + 1,
        "dev_loss": dev_loss(model, task["dev"]) if options.dev_loss else None,
    }  # fmt: skip


def _adapted(task: dict[str, Any], dtype: Any) -> Any:
    """The base with a fresh LoRA whose values come from a seed: equal in every arm."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _fast_dtype() -> Any:
    from luthier.model.load import pick_dtype

    return pick_dtype("auto", "cpu")


def _trl(arm: str, task: dict[str, Any], options: argparse.Namespace) -> tuple[list[float], Any]:
    """TRL: as a user finds it, or with every switch that makes it faster here."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    stamps: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": options.steps, "report_to": "none", "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "learning_rate": RATE, "lr_scheduler_type": "constant", "seed": 0,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    if arm == "trl_default":
        model = _adapted(task, torch.float32)
        data = Dataset.from_list(
            [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in task["train"]]
        )
        config = SFTConfig(**common, per_device_train_batch_size=options.default_batch)
    else:
        model = _adapted(task, _fast_dtype())
        data = Dataset.from_list(
            [
                {"input_ids": row["ids"], "completion_mask": [int(i >= row["prompt"]) for i in range(len(row["ids"]))]}
                for row in task["train"]
            ]
        )
        config = SFTConfig(
            **common, per_device_train_batch_size=options.micro,
            gradient_accumulation_steps=options.batch // options.micro, bf16=False, gradient_checkpointing=False,
            completion_only_loss=True, train_sampling_strategy="group_by_length", optim="adamw_torch_fused",
            dataloader_pin_memory=False, max_length=None,
        )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return stamps, trainer.model


def _ours(arm: str, task: dict[str, Any], options: argparse.Namespace) -> tuple[list[float], Any]:
    """luthier's loop (sharing or not), or the plain loop."""
    from luthier import registry
    from luthier.records import Rendered
    from luthier.spec import TrainSpec
    from luthier.training.feed import ShuffledFeed
    from luthier.training.loop import Training

    if arm == "plain":
        return _plain(task, options)
    rows = [
        Rendered(tuple(r["ids"]), tuple(float(i >= r["prompt"]) for i in range(len(r["ids"]))), r["prompt"], str(n))
        for n, r in enumerate(task["train"])
    ]
    from luthier.model import load

    base = load.load_model(Path(task["model"]), dtype="auto", device="cpu")
    adapted = registry.make("methods", {"name": "lora", "rank": RANK}).attach(base, seed=0)
    settings = TrainSpec(batch_size=options.batch, learning_rate=RATE, schedule="constant", warmup=0.0)
    feed = ShuffledFeed(
        rows, batch_size=options.batch, seed=0, epochs=1000, max_steps=options.steps, budget=settings.tokens_per_pack,
        share=arm == "luthier",
    )  # fmt: skip
    stamps = []
    for _ in Training(adapted, registry.make("objectives", "sft"), feed, settings):
        stamps.append(time.perf_counter())
    return stamps, adapted.model


def _plain(task: dict[str, Any], options: argparse.Namespace) -> tuple[list[float], Any]:
    """Padded batches sorted by length within a step, logits at answers only, fused AdamW."""
    import torch
    from torch.nn import functional as F

    model = _adapted(task, _fast_dtype())
    model.train()
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=RATE, weight_decay=0, fused=True
    )
    stamps, rng, order = [], random.Random(0), []
    for _ in range(options.steps):
        if len(order) < options.batch:
            order = rng.sample(range(len(task["train"])), len(task["train"]))
        step, order = [task["train"][i] for i in order[: options.batch]], order[options.batch :]
        step.sort(key=lambda row: len(row["ids"]))
        count = sum(len(row["ids"]) - row["prompt"] for row in step)
        for first in range(0, len(step), options.micro):
            part = step[first : first + options.micro]
            width = max(len(row["ids"]) for row in part)
            ids, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width, dtype=torch.long)
            wanted = torch.zeros(len(part), width, dtype=torch.bool)
            for i, row in enumerate(part):
                size = len(row["ids"])
                ids[i, :size], mask[i, :size], wanted[i, row["prompt"] - 1 : size - 1] = (
                    torch.tensor(row["ids"]),
                    1,
                    True,
                )
            states = model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits = model.get_base_model().lm_head(states[wanted]).float()
            targets = ids.roll(-1, 1)[wanted]
            (F.cross_entropy(logits, targets, reduction="sum") / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stamps.append(time.perf_counter())
    return stamps, model


def dev_loss(model: Any, dev: list[dict[str, Any]]) -> float:
    """Mean loss per answer token, row by row, through the model's own forward."""
    import torch
    from torch.nn import functional as F

    model.eval()
    total = count = 0.0
    for row in dev:
        ids = torch.tensor([row["ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, row["prompt"] - 1 : -1].float()
        total += float(F.cross_entropy(logits, ids[0, row["prompt"] :], reduction="sum"))
        count += len(row["ids"]) - row["prompt"]
    return total / count


# ---------------------------------------------------------------- the comparison


def main() -> None:
    """Run all arms in alternating order and print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo", choices=["demo", "snips_nlu", "banking77", "lamini_docs"])
    parser.add_argument("--examples", type=int, default=64, help="training rows")
    parser.add_argument("--dev", type=int, default=24, help="rows of the dev loss")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of an arm")
    parser.add_argument("--batch", type=int, default=16, help="examples per optimiser step")
    parser.add_argument("--micro", type=int, default=8, help="rows that the padded arms compute at once")
    parser.add_argument("--default-batch", type=int, default=8, help="trl_default's batch: TRL's own default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--dev-loss", action="store_true", help="also measure the dev loss after training")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print("RESULT " + json.dumps(run_arm(options.arm, options.folder, options)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = prepare(options.data, folder, options.examples, options.dev)
        print(json.dumps(facts))
        results = [one for number in range(options.rounds) for one in _round(number, folder, options)]
    summary = summarise(results)
    told = {
        "data": options.data,
        "facts": facts,
        "settings": _settings(options),
        "machine": _machine(),
        "summary": summary,
        "runs": results,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    print(json.dumps(summary, indent=2))


def _round(number: int, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    arms = options.arms if number % 2 == 0 else options.arms[::-1]
    results = []
    for arm in arms:
        command = [sys.executable, __file__, "--arm", arm, "--folder", str(folder), "--steps", str(options.steps),
                   "--batch", str(options.batch), "--micro", str(options.micro),
                   "--default-batch", str(options.default_batch)]  # fmt: skip
        done = subprocess.run(
            [*command, *(["--dev-loss"] if options.dev_loss else [])], capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
        results.append(json.loads(lines[0].removeprefix("RESULT ")))
        print(json.dumps(results[-1]), flush=True)
    return results


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range by arm, and luthier's ratio to every other arm."""
    summary: dict[str, Any] = {}
    for arm in dict.fromkeys(result["arm"] for result in results):
        mine = [result for result in results if result["arm"] == arm]
        speeds = [result["examples_per_second"] for result in mine]
        summary[arm] = {
            "examples_per_second": round(statistics.median(speeds), 3),
            "range": [round(min(speeds), 3), round(max(speeds), 3)],
            "peak_mib": round(statistics.median(result["peak_mib"] for result in mine)),
            "dev_loss": mine[-1]["dev_loss"],
        }
    if "luthier" in summary:
        own = summary["luthier"]["examples_per_second"]
        summary["ratios"] = {a: round(own / s["examples_per_second"], 2) for a, s in summary.items() if a != "luthier"}
    return summary


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(options).items()
        if key in ("examples", "dev", "steps", "batch", "micro", "rounds")
    }


def _machine() -> dict[str, Any]:
    import peft
    import torch
    import transformers
    import trl

    return {
        "processor": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "dtype": str(_fast_dtype()).removeprefix("torch."), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
        "trl": trl.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


if __name__ == "__main__":
    main()
