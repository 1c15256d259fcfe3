"""Supervised tuning side by side: luthier against TRL's SFTTrainer, same rows, same adapter, same machine, one run.

    python bench/sft_vs_trl.py --data demo --examples 64 --rounds 3 --out docs/benchmarks/demo.json
    python bench/sft_vs_trl.py --report docs/benchmarks/demo.json     the split of the gain, from kept figures

Data sets: demo, snips_nlu (a long instruction), banking77 (a list of 77 labels, 400 tokens), lamini_docs and e2e_nlg (next
to nothing to share).

Arms, each in a fresh process per round, in alternating order:
  trl_default   SFTTrainer as installed (its own dtype, gradient checkpointing, padding)
  trl_tuned     the same tuned: this machine's fast dtype, no autocast, no checkpointing, answers only, rows grouped by
                length, fused AdamW, no pinned memory, best of the batch sizes tried
  plain         a loop that a good engineer would write: padded batches, logits at answers only
  unshared      luthier with prefix sharing off
  luthier       luthier's default path
Every arm starts from the same adapter values and sees the same token ids, `--batch` examples per optimiser step. Times
start after the first step. After training, one plain function measures every arm's loss on the same dev rows.

luthier's arms also tell how many tokens they computed, how many floating point operations that needed, and which share
of this machine's matrix-product limit they reached; operations are counted in the first step, which is not timed.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gain import print_split, split, summarise
from rows import DATA, rows_of

ARMS = ("trl_default", "trl_tuned", "plain", "unshared", "luthier")
RANK, RATE = 16, 1e-3


def prepare(name: str, folder: Path, examples: int, dev: int, *, base: str, seed: int = 0) -> dict[str, Any]:
    """Render rows once with luthier's chat template and write the ids that every arm reads."""
    from luthier import registry
    from luthier.model import catalog
    from luthier.records import Example, Message, Origin
    from luthier.text.render import render
    from luthier.text.tokenizer import Tokenizer

    model = catalog.locate(base)
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

# When each step ended, the model, and what its timed steps computed, asked for with their seconds
Ran = tuple[list[float], Any, Callable[[float], dict[str, Any]] | None]


def run_arm(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and return its figures."""
    import torch

    from luthier.training import peak

    task = json.loads((folder / "task.json").read_text("utf-8"))
    torch.manual_seed(0)
    before = time.perf_counter()
    stamps, model, work = (_trl if arm.startswith("trl") else _ours)(arm, task, options)
    steps, batch = len(stamps) - 1, options.default_batch if arm == "trl_default" else options.batch
    seconds = stamps[-1] - stamps[0]
    most = peak.resident() / 2**20
    return {
        "arm": arm, "examples_per_second": steps * batch / seconds, "peak_mib": round(most),
        "first_step_seconds": round(stamps[0] - before, 2), "steps": steps + 1,
        "dev_loss": dev_loss(model, task["dev"]) if options.dev_loss else None,
        **(work(seconds) if work else {}),
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


def _trl(arm: str, task: dict[str, Any], options: argparse.Namespace) -> Ran:
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
    return stamps, trainer.model, None


def _ours(arm: str, task: dict[str, Any], options: argparse.Namespace) -> Ran:
    """luthier's loop (sharing or not), or the plain loop."""
    from luthier import registry
    from luthier.model import limit, load
    from luthier.records import Rendered
    from luthier.spec import TrainSpec
    from luthier.training import work
    from luthier.training.feed import ShuffledFeed
    from luthier.training.loop import Training
    from luthier.training.profile import Watch, matrices

    if arm == "plain":
        return _plain(task, options)
    rows = [
        Rendered(tuple(r["ids"]), tuple(float(i >= r["prompt"]) for i in range(len(r["ids"]))), r["prompt"], str(n))
        for n, r in enumerate(task["train"])
    ]
    base = load.load_model(Path(task["model"]), dtype="auto", device="cpu")
    own = matrices(base)
    adapted = registry.make("methods", {"name": "lora", "rank": RANK}).attach(base, seed=0)
    settings = TrainSpec(batch_size=options.batch, learning_rate=RATE, schedule="constant", warmup=0.0)
    feed = ShuffledFeed(
        rows, batch_size=options.batch, seed=0, epochs=1000, max_steps=options.steps, budget=settings.tokens_per_pack,
        share=arm == "luthier",
    )  # fmt: skip
    training = Training(adapted, registry.make("objectives", "sft"), feed, settings)
    watch, going, stamps, packs = Watch(training, adapted, own), iter(training), [], []
    with watch.watching() as seen:
        next(going)
    stamps.append(time.perf_counter())
    rates, products = work.rates(seen, watch.packs, adapted), seen.base_products()
    for _ in going:
        stamps.append(time.perf_counter())
        packs += watch.packs

    def counted(seconds: float) -> dict[str, Any]:
        """What the timed steps computed, against what this machine can; measured when they are over."""
        flops = sum(rates.of(packs).values())
        best = limit.measure(products, dtype=base.dtype).rate
        return {
            "tokens": sum(len(pack) for pack in packs), "plain_tokens": sum(pack.plain_tokens for pack in packs),
            "targets": sum(len(pack.target_ids) for pack in packs), "gflop": flops / 1e9,
            "less_work_by_sharing": sum(rates.separate(packs, everywhere=False).values()) / flops,
            "less_work_by_logits": sum(rates.separate(packs, everywhere=True).values())
            / sum(rates.separate(packs, everywhere=False).values()),
            "gflops": flops / seconds / 1e9, "limit_gflops": best.median / 1e9,
            "limit_range": [best.low / 1e9, best.high / 1e9], "share_of_limit": flops / seconds / best.median,
        }  # fmt: skip

    return stamps, adapted.model, counted


def _plain(task: dict[str, Any], options: argparse.Namespace) -> Ran:
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
    return stamps, model, None


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
    parser.add_argument("--data", default="demo", choices=DATA)
    parser.add_argument("--model", default="smollm2-135m", help="the base, by its name")
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
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="tell the split of the gain of kept runs"
    )
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print("RESULT " + json.dumps(run_arm(options.arm, options.folder, options)))
        return
    if options.report:
        for path in options.report:
            print_split(path.stem, json.loads(path.read_text("utf-8"))["runs"])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = prepare(options.data, folder, options.examples, options.dev, base=options.model)
        print(json.dumps(facts))
        results = [one for number in range(options.rounds) for one in _round(number, folder, options)]
    summary = summarise(results)
    told = {
        "data": options.data,
        "facts": facts,
        "settings": _settings(options),
        "machine": _machine(),
        "summary": summary,
        "gain": split(results),
        "runs": results,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    print(json.dumps(summary, indent=2))
    print_split(options.data, results)


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
