"""The peak memory of tuning with a method, measured in a process of its own.

A process's peak is a high-water mark that never falls, so methods that run one after another in one process cannot be
told apart. Here each gets a fresh process that loads the base, attaches the method, takes the heaviest steps of the run
and looks at the dev rows, as `luthier train` would.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.flows.trials import Bench, Trial
from luthier.spec import RunSpec

HEAVY_STEPS = 2
LOOKED_AT = 60  # steps, spread over the run, among which the heaviest are sought


def peak_memory(bench: Bench, trial: Trial) -> int:
    """Peak bytes of a fresh process that tunes with a trial's method; LuthierError with its last words if it dies."""
    asked = {
        "spec": bench.spec.model_dump(mode="json"),
        "trial": dataclasses.asdict(trial),
        "folder": str(bench.folder),
    }
    done = subprocess.run(
        [sys.executable, "-m", "luthier.flows.probe"], input=json.dumps(asked), capture_output=True, text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LuthierError(f"the process that measures '{trial.method['name']}' ended with {done.returncode}: {last}")
    return int(done.stdout.strip().splitlines()[-1])


def measure(spec: RunSpec, trial: Trial, folder: Path) -> int:
    """Take the run's heaviest steps in this process and return its peak, in bytes."""
    from luthier.training.loop import Training

    bench = Bench.open(spec, folder)
    feed = _Heaviest(bench)
    with bench.attached(trial) as (adapted, method, prepared):
        settings = prepared.spec.train.model_copy(update={"eval_every": feed.total_steps})
        training = Training(
            adapted, prepared.objective, feed, settings, device=adapted.model.device, dev_packs=bench.dev_packs,
            method=method,
        )  # fmt: skip
        return [step.memory for step in training][-1]


class _Heaviest:
    """A feed of the steps whose largest pack is largest."""

    def __init__(self, bench: Bench) -> None:
        feed = bench.prepared.feed(share=bench.share)
        assert hasattr(feed, "batch"), "a study's rows are in memory"
        count = min(LOOKED_AT, feed.total_steps)
        batches = [feed.batch(math.floor(place * feed.total_steps / count)) for place in range(count)]
        batches.sort(key=lambda batch: max((len(pack) for pack in batch.packs), default=0), reverse=True)
        self._batches = batches[:HEAVY_STEPS]
        self.total_steps, self.steps_per_epoch = len(self._batches), feed.steps_per_epoch
        self._next = 0

    def __iter__(self) -> _Heaviest:
        return self

    def __next__(self) -> Any:
        if self._next >= len(self._batches):
            raise StopIteration
        self._next += 1
        return self._batches[self._next - 1]

    def state(self) -> dict[str, Any]:
        """The position."""
        return {"step": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._next = int(state["step"])


def _main() -> None:
    asked = json.load(sys.stdin)
    peak = measure(RunSpec.model_validate(asked["spec"]), Trial(**asked["trial"]), Path(asked["folder"]))
    print(peak)


if __name__ == "__main__":
    _main()
