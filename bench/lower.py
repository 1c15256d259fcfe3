"""Head and top-layer tuning over epochs, with and without the states of frozen lower layers kept.

    python bench/lower.py demo/task.yaml --out docs/benchmarks/lower.json

Both ways train the same rows in the same order in one process, in turns; time is that of the whole training (the pass
that fills the store and the dev losses included), and the weights that both end with are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from luthier import registry
from luthier import spec as specs
from luthier.flows.lower import keep_lower
from luthier.flows.prepare import Prepared, prepare
from luthier.model import load
from luthier.text import pack
from luthier.training.loop import Training

METHODS = {
    "head": {"name": "head"},
    "top third": {"name": "layers", "last": 10},
    "adapters on the top third": {"name": "bottleneck", "layers": list(range(20, 30))},
}


def train(
    prepared: Prepared, base: Any, options: dict[str, Any], *, keeps: bool
) -> tuple[float, dict[str, Any], float]:
    """Train once; seconds, the trained values, the last loss."""
    method = registry.make("methods", options, "method")
    adapted = method.attach(base, seed=0)
    settings = prepared.spec.train
    dev = pack.plan(prepared.rendered_dev, budget=settings.tokens_per_pack)
    began = time.perf_counter()
    lower = keep_lower(adapted.model, prepared, dev, share=True) if keeps else None
    assert (lower is not None) == keeps, "kept where it was asked"
    steps = list(
        Training(
            adapted, prepared.objective, prepared.feed(share=True), settings, dev_packs=dev, method=method, lower=lower
        )
    )
    seconds = time.perf_counter() - began
    values = {name: value.detach().clone() for name, value in adapted.trainable().items()}
    adapted.detach()
    return seconds, values, steps[-1].loss


def distance(one: dict[str, Any], two: dict[str, Any], fresh: dict[str, Any]) -> float:
    """How far two ends lie apart, as a share of the way that training went."""
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    way = sum(float((one[name] - fresh[name]).square().sum()) for name in one)
    return float((apart / way) ** 0.5)


def compare(prepared: Prepared, base: Any, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Both ways, in turns."""
    method = registry.make("methods", options, "method")
    adapted = method.attach(base, seed=0)
    fresh = {name: value.detach().clone() for name, value in adapted.trainable().items()}
    adapted.detach()
    ratios, found, last = [], {}, {}
    for turn in range(rounds):
        for keeps in (True, False) if turn % 2 else (False, True):
            found[keeps], last[keeps], _ = train(prepared, base, options, keeps=keeps)
        ratios.append(found[False] / found[True])
    return {
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "seconds": {"kept": found[True], "usual": found[False]},
        "weights_apart": distance(last[False], last[True], fresh),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--rows", type=int, default=128, help="training rows")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    spec = specs.load(asked.task, [f"train.epochs={asked.epochs}", "train.patience=null", "train.schedule=constant"])
    prepared = prepare(spec)
    prepared.train, prepared.dev = prepared.train[: asked.rows], prepared.dev[:32]
    base = load.load_model(prepared.model_folder, dtype=spec.model.dtype, device="cpu")
    result = {
        "task": str(asked.task), "epochs": asked.epochs, "rows": len(prepared.train), "threads": torch.get_num_threads(),
        "methods": {name: compare(prepared, base, METHODS[name], asked.rounds) for name in asked.methods},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
