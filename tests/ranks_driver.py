"""Train a small network in each of the processes that were started together, case after case; the first tells all.

    python -m torch.distributed.run --nproc-per-node=2 ranks_driver.py '[{"folder": "/tmp/a", "sharded": true}]'

Alone it is the single process that the others are compared with.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import networks
import torch
import toy

from luthier import registry
from luthier.training import ranks, sharded, shares
from luthier.training.checkpoint import Checkpoints
from luthier.training.loop import Training

METHOD = {"name": "lora", "rank": 4}


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case; losses, dev losses, notes, the adapter's digest, and tokens computed in each step."""
    torch.set_num_threads(1)
    apart, folder = case.get("sharded", False), Path(case["folder"])
    here = ranks.here("cpu", sharded=apart)
    net = networks.network(case.get("kind", "llama"))
    if apart:
        sharded.shard(net, "cpu")
    method = registry.make("methods", {**METHOD, **case.get("method", {})})
    adapted = sharded.attach(method, net, seed=1, evidence=None) if apart else method.attach(net, seed=1)
    asked = toy.settings(**{"eval_every": 3, "save_every": 1, "learning_rate": 1e-3, **case.get("settings", {})})
    cost = shares.Cost.of(net)
    plan = shares.planner(here.count, cost, in_step=here.sharded)
    source = toy.ShuffledFeed(
        toy.rows(22),
        batch_size=asked.batch_size,
        seed=3,
        epochs=asked.epochs,
        budget=case.get("budget", 4096),
        plan=plan,
    )
    resume = case.get("resume", False)
    training = Training(
        adapted, registry.make("objectives", "sft"), source, asked, method=method, ranks=here, resume=resume,
        dev_packs=plan(toy.rows(7, seed=9), budget=64), checkpoints=Checkpoints(folder / "checkpoints"),
    )  # fmt: skip
    steps = []
    for step in training:
        steps.append(step)
        if step.index == case.get("stop"):
            break
    if here.first:
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        adapted.save(folder / "adapter")
    mine = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in adapted.trainable().values())).hexdigest()
    return {
        "losses": [step.loss for step in steps],
        "tokens": [step.tokens for step in steps],
        "dev": [step.dev_loss for step in steps if step.dev_loss is not None],
        "notes": training.notes,
        "digests": here.exchange(mine),
        "held": here.exchange(sharded.held_bytes(net)),
        "first": here.first,
    }


def main(cases: list[dict[str, Any]]) -> None:
    """Run all cases and print what each came to."""
    told = [train(case) for case in cases]
    if told[0]["first"]:
        print("END", json.dumps(told))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
