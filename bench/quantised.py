"""What a quantised base costs and keeps: bits, held-out loss, step time, and LoRA on NF4 against LoRA on float32.

    python bench/quantised.py OUT.json --data ../shared/data [--model smollm2-135m] [--threads 2]

Loss is in nats a token over whole texts (paragraphs that ship with luthier, and answers of lamini_docs), its difference
to float32 paired by text with a bootstrap interval. Step times alternate between the kinds. The LoRA arms see the same
rows in the same order from the same first values; their gap is paired by seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import tempfile
import time
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from luthier import registry
from luthier.data.read import read
from luthier.model import catalog, load, quantize
from luthier.model.batch import Batch
from luthier.model.logprob import logprobs
from luthier.records import Loss, Rendered
from luthier.spec import QuantizeSpec, TrainSpec
from luthier.text import pack
from luthier.text.render import render_all
from luthier.text.tokenizer import Tokenizer
from luthier.training.feed import ShuffledFeed
from luthier.training.loop import Training

KINDS: dict[str, QuantizeSpec | None] = {
    "float32": None,
    "int8": QuantizeSpec(name="int8"),
    "nf4": QuantizeSpec(name="nf4"),
    "nf4, plain constants": QuantizeSpec(name="nf4", double=False),
    "fp4": QuantizeSpec(name="fp4"),
    "fp4, plain constants": QuantizeSpec(name="fp4", double=False),
}
LONGEST, SEEDS, STEPS, BATCH, RATE = 96, (0, 1, 2), 20, 8, 1e-3
BUDGET = 1024


class Sft:
    """The mean loss over targets."""

    def loss(self, logprobs: torch.Tensor, batch: Any) -> Loss:
        return Loss(-(logprobs * batch.target_weights).sum(), float(batch.target_weights.sum()))


def texts(data: Path, tokenizer: Tokenizer, count: int) -> list[Rendered]:
    """Held-out texts, every token of them a target."""
    general = resources.files("luthier.evaluate").joinpath("general.txt").read_text("utf-8").split("\n\n")
    answers = [example.answer for example in read([data / "lamini_docs" / "lamini_docs.jsonl"]).examples]
    made = []
    for index, text in enumerate([*general[:count], *answers[:count]]):
        ids = tuple(tokenizer.encode(text)[:LONGEST])
        made.append(Rendered(ids, (0.0, *(1.0,) * (len(ids) - 1)), 1, str(index)))
    return [row for row in made if len(row.ids) > 8]


@torch.no_grad()
def losses(model: Any, rows: list[Rendered]) -> tuple[np.ndarray, np.ndarray]:
    """Each row's summed loss and its number of targets."""
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
    place = {row.example_id: index for index, row in enumerate(rows)}
    for one in pack.plan(rows, budget=BUDGET):
        batch = Batch.of(one, "cpu")
        found = -logprobs(model, batch).double().numpy()
        where = np.array([place[one.rows[r]] for r in one.target_row])
        np.add.at(sums, where, found)
        np.add.at(counts, where, 1)
    return sums, counts


def interval(sums: np.ndarray, counts: np.ndarray) -> list[float]:
    """Mean per token and its 95 % bootstrap interval over texts."""
    drawn = np.random.default_rng(0).integers(0, len(sums), (4000, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return [float(sums.sum() / counts.sum()), float(low), float(high)]


@torch.no_grad()
def int4(model: Any) -> Any:
    """Round the matrices of a plain model to 15 even levels of each 64 weights' absolute maximum: not offered, compared."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is torch.nn.Linear and module is not head:
            blocks = module.weight.data.view(-1, 64)
            scale = blocks.abs().amax(1, keepdim=True)
            blocks.copy_((blocks / scale * 7).round() / 7 * scale)
    return model


def quality(folder: Path, rows: list[Rendered]) -> dict[str, Any]:
    """Bits and held-out loss of every kind."""
    found: dict[str, Any] = {}
    plain: np.ndarray | None = None
    for name in [*KINDS, "int4 by absmax"]:
        asked = KINDS.get(name)
        model = load.load_model(folder, dtype="float32", quantize=asked)
        model = int4(model) if name.startswith("int4") else model
        told = quantize.bits(model) if asked else None
        sums, counts = losses(model, rows)
        plain = sums if plain is None else plain
        mean, low, high = interval(sums, counts)
        found[name] = {
            "bits_matrices": told.matrices if told else 4.5 if name.startswith("int4") else 32.0,
            "bits_whole": told.whole if told else None if name.startswith("int4") else 32.0,
            "loss": [mean, low, high],
            "perplexity": float(np.exp(mean)),
            "loss_above_float32": interval(sums - plain, counts),
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def step_times(folder: Path, rows: list[Rendered], rounds: int) -> dict[str, Any]:
    """Seconds of a LoRA step (forward and backward) of each kind, alternating; medians and ratios to float32."""
    kinds = {name: KINDS[name] for name in ("float32", "nf4", "int8")}
    (one, *_) = pack.plan(rows, budget=512)
    arms = {}
    for name, asked in kinds.items():
        base = load.load_model(folder, dtype="float32", quantize=asked)
        arms[name] = registry.make("methods", {"name": "lora", "rank": 8}).attach(base, seed=0)
        arms[name].model.train()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name, adapted in arms.items():
            began = time.perf_counter()
            (-logprobs(adapted.model, Batch.of(one, "cpu")).sum()).backward()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    ratios = {
        name: median(a / b for a, b in zip(seconds[name], seconds["float32"], strict=True)) for name in ("nf4", "int8")
    }
    return {"tokens": len(one), "seconds": seconds, "ratio_to_float32": ratios}


def e2e_rows(data: Path, tokenizer: Tokenizer, template: Any) -> tuple[list[Rendered], list[Rendered]]:
    """Training and dev rows of E2E NLG: a table in words becomes a sentence; whole tables on one side."""
    with (data / "e2e_nlg" / "devset.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tables = sorted({row["mr"] for row in rows})
    order = np.random.default_rng(7).permutation(len(tables))
    held = {tables[i] for i in order[:40]}
    picked: dict[bool, list[Any]] = {True: [], False: []}
    for row in rows:
        side, room = row["mr"] in held, 48 if row["mr"] in held else STEPS * BATCH
        if len(picked[side]) < room:
            picked[side].append(row)
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        for side in (False, True):
            path = Path(folder) / f"{side}.jsonl"
            lines = (json.dumps({"prompt": row["mr"], "completion": row["ref"]}) + "\n" for row in picked[side])
            path.write_text("".join(lines), "utf-8")
            sides.append(render_all(read([path]).examples, template, tokenizer).rendered)
    return sides[0], sides[1]


def tuned_loss(
    folder: Path, asked: QuantizeSpec | None, train: list[Rendered], dev: list[Rendered], seed: int
) -> float:
    """Dev loss per answer token after STEPS steps of LoRA."""
    settings = TrainSpec(
        max_steps=STEPS, batch_size=BATCH, learning_rate=RATE, seed=seed, patience=None, eval_every=STEPS,
        tokens_per_pack=BUDGET,
    )  # fmt: skip
    method = registry.make("methods", {"name": "lora", "rank": 8})
    adapted = method.attach(load.load_model(folder, dtype="float32", quantize=asked), seed=seed)
    feed = ShuffledFeed(
        [[row] for row in train], batch_size=BATCH, seed=seed, epochs=1, max_steps=STEPS, budget=BUDGET, share=True
    )
    run = Training(adapted, Sft(), feed, settings, method=method, dev_packs=pack.plan(dev, budget=BUDGET))
    last = [step.dev_loss for step in run if step.dev_loss is not None][-1]
    assert last is not None
    return float(last)


def tuning(folder: Path, data: Path, tokenizer: Tokenizer, template: Any) -> dict[str, Any]:
    """LoRA on NF4 against LoRA on float32: the gap of dev losses, paired by seed."""
    train, dev = e2e_rows(data, tokenizer, template)
    found: dict[str, list[float]] = {"float32": [], "nf4": []}
    base = {name: losses(load.load_model(folder, dtype="float32", quantize=KINDS[name]), dev) for name in found}
    for seed in SEEDS:
        for name in found:
            found[name].append(tuned_loss(folder, KINDS[name], train, dev, seed))
            print("seed", seed, name, found[name][-1], flush=True)
    gaps = np.array(found["nf4"]) - np.array(found["float32"])
    half = 4.303 * gaps.std(ddof=1) / np.sqrt(len(gaps))  # Student's t, two degrees of freedom
    return {
        "task": "E2E NLG, table to sentence", "rows": len(train), "dev_rows": len(dev), "steps": STEPS, "batch": BATCH,
        "before": {name: float(sums.sum() / counts.sum()) for name, (sums, counts) in base.items()},
        "after": found,
        "gap": [float(gaps.mean()), float(gaps.mean() - half), float(gaps.mean() + half)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    folder = catalog.locate(asked.model)
    tokenizer, template = Tokenizer.from_folder(folder), registry.make("templates", "chat")
    rows = texts(asked.data, tokenizer, asked.texts)
    found = {
        "model": asked.model,
        "machine": {
            "cores": asked.threads, "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__, "python": platform.python_version(),
        },
        "texts": {"rows": len(rows), "tokens": sum(len(row.ids) for row in rows)},
    }  # fmt: skip
    for name, part in (
        ("quality", lambda: quality(folder, rows)),
        ("step", lambda: step_times(folder, rows, asked.rounds)),
        ("lora", lambda: tuning(folder, asked.data, tokenizer, template)),
    ):
        found[name] = part()
        asked.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
