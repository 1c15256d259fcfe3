"""Is the memory that `luthier plan` predicts the memory that training takes? Each case runs in fresh processes.

    python bench/plan_memory.py                 all cases; writes docs/benchmarks/plan.json and prints the table
    python bench/plan_memory.py predict-again   predictions anew beside the kept measurements
    python bench/plan_memory.py runtime         what the libraries take: the constant in training/memory.py
    python bench/plan_memory.py smollm2-135m lora 1024     one case

Measured is the process's largest resident size after some real optimiser steps (`Step.memory`), with weights loaded, the
method attached and the optimiser's state allocated. Rows are drawn at random around one shared prefix.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from luthier import registry
from luthier.records import Rendered
from luthier.spec import TrainSpec
from luthier.training.feed import ShuffledFeed

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "plan.json"
STEPS, DTYPE, PREFIX, ANSWER = 3, "float32", 140, 10
CASES: list[tuple[str, dict[str, Any], int, bool]] = [
    ("smollm2-135m", {"name": "lora"}, 512, False),
    ("smollm2-135m", {"name": "lora"}, 1536, False),
    ("smollm2-135m", {"name": "lora"}, 1536, True),
    ("smollm2-135m", {"name": "lora", "dropout": 0.05}, 1024, False),
    ("smollm2-135m", {"name": "ia3"}, 1024, False),
    ("smollm2-135m", {"name": "layers"}, 1024, False),
    ("smollm2-135m", {"name": "full"}, 512, False),
    ("smollm2-135m", {"name": "head"}, 1024, False),
    ("smollm2-135m", {"name": "bottleneck"}, 1024, False),
    ("smollm2-135m", {"name": "prompt"}, 1024, False),
    ("smollm2-135m", {"name": "prefix"}, 1024, False),
    ("smollm2-135m", {"name": "bitfit"}, 1024, False),
    ("smollm2-135m", {"name": "dora"}, 512, False),
    ("smollm2-135m", {"name": "lora"}, 512, True),
    ("smollm2-135m", {"name": "ia3"}, 1024, True),
    ("gemma-3-270m", {"name": "lora"}, 768, True),
    ("gemma-3-270m", {"name": "lora"}, 1024, False),
    ("gemma-3-270m", {"name": "ia3"}, 512, False),
    ("gemma-3-270m", {"name": "layers"}, 1024, False),
]  # fmt: skip


def settings(tokens: int, checkpointing: bool) -> TrainSpec:
    """One pack of about so many tokens in each step."""
    rows = max(2, (tokens - PREFIX) // 54)
    return TrainSpec(batch_size=rows, max_steps=STEPS, tokens_per_pack=tokens, checkpointing=checkpointing)


def feed(asked: TrainSpec) -> ShuffledFeed:
    """Rows of 40 to 70 own tokens behind a prefix that all share."""
    draw = np.random.default_rng(0)
    prefix = [10 + index % 90 for index in range(PREFIX)]
    rows = []
    for index in range(2 * asked.batch_size):
        ids = (*prefix, *draw.integers(10, 100, int(draw.integers(40, 70))).tolist())
        weights = (*[0.0] * (len(ids) - ANSWER), *[1.0] * ANSWER)
        rows.append(Rendered(ids, weights, len(ids) - ANSWER, str(index)))
    return ShuffledFeed(
        rows, batch_size=asked.batch_size, seed=0, epochs=STEPS, max_steps=STEPS, budget=asked.tokens_per_pack
    )


def predict(model: str, method: dict[str, Any], tokens: int, checkpointing: bool) -> dict[str, Any]:
    """What the planner says, from the configuration alone."""
    import torch
    from transformers import AutoConfig

    from luthier.model import catalog
    from luthier.training import memory, plan

    asked, folder = settings(tokens, checkpointing), catalog.locate(model)
    made = memory.bare(AutoConfig.from_pretrained(folder), getattr(torch, DTYPE))
    rig = memory.rig(made, registry.make("methods", method, "method"))
    largest = plan.tally(feed(asked)).largest
    assert largest is not None
    log = memory.rehearse_step(rig, largest, checkpointing=checkpointing)
    found = memory.gather(rig, {"tune": log}, asked, file_bytes=plan.file_bytes(folder, "F32"))
    return {"predicted": found.total, "parts": dict(found.parts), "pack": len(largest), "trainable": rig.trainable}


def measure(model: str, method: dict[str, Any], tokens: int, checkpointing: bool) -> dict[str, Any]:
    """What real steps take."""
    from luthier.model import catalog, load
    from luthier.training.loop import Training

    asked = settings(tokens, checkpointing)
    base = load.load_model(catalog.locate(model), dtype=DTYPE, device="cpu")
    adapted = registry.make("methods", method, "method").attach(base, seed=0)
    objective = registry.make("objectives", {"name": "sft"}, "objective")
    steps = list(Training(adapted, objective, feed(asked), asked))
    return {"measured": max(step.memory for step in steps), "seconds": [round(step.seconds, 1) for step in steps]}


def fresh(verb: str, *case: Any) -> dict[str, Any]:
    """Run `predict` or `measure` in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, verb, json.dumps(case)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        return {"error": run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "died"}
    return dict(json.loads(run.stdout.splitlines()[-1]))


def compare(*case: Any) -> dict[str, Any]:
    """One case, predicted and measured."""
    model, method, tokens, checkpointing = case
    told = {"model": model, "method": method, "tokens_per_pack": tokens, "checkpointing": checkpointing}
    told |= fresh("predict", *case) | fresh("measure", *case)
    if "error" not in told:
        told["ratio"] = told["predicted"] / told["measured"]
    return told


def again(told: dict[str, Any]) -> dict[str, Any]:
    """A case with its prediction made anew."""
    case = (told["model"], told["method"], told["tokens_per_pack"], told["checkpointing"])
    told = {**told, **predict(*case)}
    return {**told, "ratio": told["predicted"] / told["measured"]}


def line(told: dict[str, Any]) -> str:
    """A row of the table in docs/plan.md."""
    method = " ".join([told["method"]["name"], *(f"{k} {v}" for k, v in told["method"].items() if k != "name")])
    method += ", checkpointing" if told["checkpointing"] else ""
    if "error" in told:
        return f"| {told['model']} | {method} | {told['tokens_per_pack']} | | | {told['error'][:60]} |"
    sizes = f"{told['predicted'] / 1e6:,.0f} | {told['measured'] / 1e6:,.0f} | {told['ratio']:.2f}"
    return f"| {told['model']} | {method} | {told['pack']} | {sizes} |"


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "all"
    if verb in ("predict", "measure"):
        print(json.dumps({"predict": predict, "measure": measure}[verb](*json.loads(sys.argv[2]))))
    elif verb == "runtime":
        print(fresh("measure", "tiny", {"name": "lora"}, 256, False))
    elif verb == "all":
        found = []
        for case in CASES:
            found.append(compare(*case))
            print(line(found[-1]), flush=True)
            OUT.write_text(json.dumps({**machine(), "cases": found}, indent=1) + "\n", "utf-8")
    elif verb == "predict-again":
        kept = json.loads(OUT.read_text("utf-8"))
        kept["cases"] = [again(told) for told in kept["cases"]]
        OUT.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
        print("\n".join(map(line, kept["cases"])))
    elif verb == "json":
        print(json.dumps(compare(sys.argv[2], {"name": sys.argv[3]}, int(sys.argv[4]), False)))
    else:
        print(line(compare(verb, {"name": sys.argv[2]}, int(sys.argv[3]), "checkpointing" in sys.argv)))


def machine() -> dict[str, Any]:
    """Where it was measured."""
    import torch

    libc = " ".join(platform.libc_ver())
    return {"system": platform.system(), "machine": platform.machine(), "libc": libc, "torch": torch.__version__,
            "threads": torch.get_num_threads(), "dtype": DTYPE, "steps": STEPS}  # fmt: skip


if __name__ == "__main__":
    main()
