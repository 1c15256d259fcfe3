"""Where trials run: in this process one after another, or as Ray tasks on a cluster. Both give results as they come."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from luthier.errors import MissingExtra
from luthier.flows.events import Listener, Stage
from luthier.flows.trials import Bench, Trial
from luthier.spec import RunSpec

Result = Mapping[str, Any]
Name = TypeVar("Name", bound=Hashable)
ATTEMPTS = 2  # a worker that dies (memory, a lost machine) is given its trial once more


class Pool(Protocol):
    """Runs trials. `width` is how many run at a time."""

    width: int

    def run(self, trials: Mapping[Name, Trial], tell: Listener) -> Iterator[tuple[Name, Result]]:
        """Run all of them and yield each one's name with its result, in the order in which they end."""


class Here:
    """This process, one trial after another on the bench's own base."""

    width = 1

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def run(self, trials: Mapping[Name, Trial], tell: Listener) -> Iterator[tuple[Name, Result]]:
        """Run trials in their order."""
        for name, trial in trials.items():
            if self._bench.kept(trial) is None:
                tell(Stage("trial", trial.words))
            yield name, self._bench.run(trial, tell)


class Cluster:
    """Ray tasks. Workers must see the study's folder and the data under the same paths."""

    def __init__(self, bench: Bench, ray: Any) -> None:
        self._bench, self._ray = bench, ray
        self._cpus = bench.spec.train.threads or 1
        gpus = 1 if bench.identity["device"].startswith("cuda") else 0
        self._task = ray.remote(num_cpus=self._cpus, num_gpus=gpus, max_retries=ATTEMPTS - 1)(run_alone)
        self.width = max(1, int(ray.cluster_resources().get("CPU", 1)) // self._cpus)

    def run(self, trials: Mapping[Name, Trial], tell: Listener) -> Iterator[tuple[Name, Result]]:
        """Send every trial that has no result yet, and yield as they end."""
        spec, folder = self._bench.spec.model_dump(mode="json"), str(self._bench.folder.resolve())
        waiting = {}
        for name, trial in trials.items():
            kept = self._bench.kept(trial)
            if kept is not None:
                yield name, kept
            else:
                waiting[self._task.remote(spec, trial, folder, self._cpus)] = name
        while waiting:
            (done,), _ = self._ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(done), self._ray.get(done)


@contextmanager
def opened(bench: Bench, address: str | None) -> Iterator[Pool]:
    """The pool for `--ray ADDRESS`, or this process; MissingExtra where Ray is asked for and not installed."""
    if address is None:
        yield Here(bench)
        return
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
    try:
        yield Cluster(bench, ray)
    finally:
        if ours:
            ray.shutdown()


def require_ray() -> None:
    """Raise MissingExtra unless Ray can be imported."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("Ray is not installed", where="--ray", remedy="pip install 'luthier[ray]'")


def run_alone(spec: Mapping[str, Any], trial: Trial, folder: str, threads: int) -> dict[str, Any]:
    """Run one trial in a worker, which prepares the rows and loads the base once for all the trials it gets."""
    asked = RunSpec.model_validate(dict(spec))
    if asked.train.threads is None:
        asked.train.threads = threads
    return _bench(asked.model_dump_json(), folder).run(trial)


@lru_cache(maxsize=1)
def _bench(spec: str, folder: str) -> Bench:
    return Bench.open(RunSpec.model_validate_json(spec), Path(folder))
