"""A training step on one, two and four local processes, one thread each, beside what the packs' cost foretells.

    python bench/scaling.py --out docs/benchmarks/scaling.json                       a random model of 13 million weights
    python bench/scaling.py --model smollm2-135m --rounds 1 --steps 3 --rows 8      a real one

The model: time(N) = largest process's predicted cost / rate + one sum over the adapter's bytes + what a step costs
besides. The rate and the rest come from one process with all and with half of a step's rows, the sum is timed apart. Processor time (of the slowest process)
is told beside wall time: on a machine with other work, or fewer cores than processes, only the former shows how work
is shared out. Counts of processes are measured in turns.
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
import time
from pathlib import Path
from typing import Any

WORKLOADS = {"instruction of 84 tokens, 28 of each row": (84, 28), "nothing shared, 112 of each row": (0, 112)}
ANSWER = 6  # supervised tokens of a row
SMALL = {
    "vocab_size": 4096, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 5,
    "num_key_value_heads": 5, "max_position_embeddings": 1024,
}  # fmt: skip


def rows(shared: int, own: int, count: int, words: int) -> list[Any]:
    """Rows of like lengths that share their first tokens."""
    from luthier.records import Rendered

    draw, made = random.Random(0), []
    for index in range(count):
        ids = [
            *range(1, shared + 1),
            *(draw.randrange(9, words) for _ in range(own + draw.randrange(-own // 4, own // 4))),
        ]
        weights = [0.0] * (len(ids) - ANSWER) + [1.0] * ANSWER
        made.append(Rendered(tuple(ids), tuple(weights), len(ids) - ANSWER, str(index)))
    return made


def network(name: str) -> Any:
    """A base by its catalog name, or a random one that is large enough for its products to count."""
    import torch

    if name != "small":
        from luthier.model import catalog, load

        return load.load_model(catalog.locate(name), dtype="float32", device="cpu")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval().requires_grad_(False)


def work(options: argparse.Namespace) -> list[dict[str, Any]]:
    """In each process: train every workload for a few steps; times and loads of every step."""
    import torch

    from luthier.training import ranks

    torch.set_num_threads(1)
    here = ranks.here("cpu", sharded=options.sharded)
    found = []
    for name in WORKLOADS:
        found.append(measure(name, here, options, options.rows))
        if here.count == 1:
            half = measure(name, here, options, options.rows // 2)
            found[-1]["half"] = {key: half[key] for key in ("processor", "slowest")}
    return found


def measure(name: str, here: Any, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """One workload's steps in this process, the first one not counted."""
    import torch

    from luthier import registry
    from luthier.spec import TrainSpec
    from luthier.training import sharded, shares
    from luthier.training.feed import ShuffledFeed
    from luthier.training.loop import Training

    net = network(options.model)
    if here.sharded:
        sharded.shard(net, "cpu")
    method = registry.make("methods", {"name": "lora", "rank": 16})
    adapted = method.attach(net, seed=0)
    cost = shares.Cost.of(net)
    settings = TrainSpec(batch_size=count, epochs=1, patience=None)
    source = ShuffledFeed(
        rows(*WORKLOADS[name], count * (options.steps + 1), net.config.vocab_size), batch_size=count, seed=0,
        epochs=1, budget=4096, plan=shares.planner(here.count, cost, in_step=here.sharded),
    )  # fmt: skip
    training = Training(adapted, registry.make("objectives", "sft"), source, settings, method=method, ranks=here)
    wall, processor, before = [], [], time.process_time()
    for step in training:
        wall.append(step.seconds)
        processor.append(time.process_time() - before)
        before = time.process_time()
    costs = [[cost(pack) for pack in source.batch(index).packs] for index in range(1, options.steps + 1)]
    return {
        "workload": name,
        "wall": wall[1:],
        "processor": [max(of_one) for of_one in zip(*here.exchange(processor[1:]), strict=True)],
        "slowest": [shares.slowest(of_step, here.count, in_step=here.sharded) for of_step in costs],
        "whole": [sum(of_step) for of_step in costs],
        "sum": summing(here, training.outcome.trainable),
        "adapter_bytes": 4 * training.outcome.trainable,
        "held_bytes": sharded.held_bytes(net),
        "loss": step.loss,
        "torch": torch.__version__,
    }


def summing(here: Any, numbers: int) -> float:
    """Seconds of adding so many float32 numbers up over all processes."""
    import torch

    taken, tensor = [], torch.zeros(numbers)
    for _ in range(5 if here.count > 1 else 0):
        here.wait()
        began = time.perf_counter()
        here.sum_(tensor)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) if taken else 0.0


def launch(count: int, options: argparse.Namespace, *more: str) -> list[dict[str, Any]]:
    """Run `work` in so many processes and read what the first one prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={count}", __file__, "--worker", *more]
    for name in ("model", "steps", "rows"):
        command += [f"--{name}", str(getattr(options, name))]
    told = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    lines = [line for line in told.stdout.splitlines() if line.startswith("END")]
    if not lines:
        sys.exit(told.stderr)
    return list(json.loads(lines[0][4:]))


def joined(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The steps of all rounds of one count."""
    lists = ("wall", "processor", "slowest", "whole")
    return [
        {**parts[0], **{key: [value for part in parts for value in part[key]] for key in lists}}
        for parts in zip(*found, strict=True)
    ]


def table(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Measured and foretold seconds, and gains over one process, of every workload and count."""
    told, median = [], statistics.median
    for place, one in enumerate(found["1"]):
        full, half = one, one["half"]
        more = median(full["processor"]) - median(half["processor"])
        rate = max(0.0, more) / (median(full["slowest"]) - median(half["slowest"]))
        besides = max(0.0, median(full["processor"]) - rate * median(full["slowest"]))
        for count, all_of_it in found.items():
            here = all_of_it[place]
            foretold = besides + rate * median(here["slowest"]) + here["sum"]
            told.append({
                "workload": one["workload"], "processes": count,
                "wall_s": round(median(here["wall"]), 3), "processor_s": round(median(here["processor"]), 3),
                "foretold_s": round(foretold, 3), "sum_s": round(here["sum"], 4), "besides_s": round(besides, 4),
                "gain_wall": round(median(one["wall"]) / median(here["wall"]), 2),
                "gain_processor": round(median(one["processor"]) / median(here["processor"]), 2),
                "gain_foretold": round(median(one["processor"]) / foretold, 2),
                "more_work": round(median(here["whole"]) / median(one["whole"]), 3),
                "held_mb": round(here["held_bytes"] / 1e6, 1), "adapter_mb": round(here["adapter_bytes"] / 1e6, 2),
                "loss": here["loss"],
            })  # fmt: skip
    return told


def main() -> None:
    """Measure all counts in turns, print the table, keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", default="small", help="small, or a base's catalog name")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        told = work(options)
        if os.environ["RANK"] == "0":
            print("END", json.dumps(told))
        return
    counts = sorted({1, *options.processes})
    ways = {**{str(count): (count, ()) for count in counts}, "2, base in parts": (2, ("--sharded",))}
    load, found = os.getloadavg()[0], {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, (count, more) in ways.items():
            found[way].append(launch(count, options, *more))
    result = {way: joined(of_way) for way, of_way in found.items()}
    told = table(result)
    for line in told:
        print(json.dumps(line))
    if options.out:
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "load_before": round(load, 2),
                   "torch": result["1"][0]["torch"], "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        settings = {name: getattr(options, name) for name in ("model", "rows", "steps", "rounds")}
        kept = {"machine": machine, "settings": settings, "table": told, "measured": result}
        options.out.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
