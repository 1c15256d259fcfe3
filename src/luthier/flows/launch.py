"""Start a run's processes on this machine, pass on what the first one tells, and say why one of them ended.

torch's elastic agent watches them: where one dies, the others are stopped at once, and nobody waits for it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier import errors, store
from luthier import spec as specs
from luthier.errors import Fault, LuthierError, SpecError, TrainingError
from luthier.flows import events
from luthier.flows.events import Event, Listener, silent
from luthier.flows.team import started
from luthier.records import Step
from luthier.spec import RunSpec

TASK, EVENTS, FAILED = "task.json", "events", "failed-{}.json"
GRACE = 120  # seconds to finish a step and save, after Ctrl-C
RESUME = "what was saved is kept: the same command with --resume"


def several(spec: RunSpec) -> int:
    """How many processes are to be started here: 1 where the run is this process, or was started as one of several.

    `auto` takes every GPU, and one process where there is none: a CPU's threads already share the work.
    """
    asked = spec.train.processes
    if asked == 1 or started() > 1:
        return 1
    import torch

    from luthier.model.load import pick_device

    kind, one, _ = pick_device(spec.model.device).partition(":")
    there = torch.cuda.device_count() if kind == "cuda" else 1
    if one:
        what, remedy = f"{spec.model.device} is one GPU", "model.device: cuda; CUDA_VISIBLE_DEVICES says which are used"
        raise SpecError(what, where="train.processes", remedy=remedy)
    if asked == "auto":
        return there
    if kind == "cuda" and asked > there:
        what, remedy = f"{asked} processes need as many GPUs, and there are {there}", "auto takes all there are"
        raise SpecError(what, where="train.processes", remedy=remedy)
    if kind not in ("cpu", "cuda"):
        remedy = "train.processes: 1"
        raise SpecError(f"several processes run on CPU and CUDA, not on {kind}", where="train.processes", remedy=remedy)
    return asked


def train(spec: RunSpec, count: int, *, resume: bool, overwrite: bool, on_event: Listener | None) -> dict[str, Any]:
    """Train in `count` processes of their own; what `flows.train` returns and raises, this returns and raises."""
    flags = [flag for flag, wanted in (("--resume", resume), ("--overwrite", overwrite)) if wanted]
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        folder = Path(place)
        store.write_json(folder / TASK, specs.resolve_paths(spec, Path.cwd()).model_dump(mode="json"))
        with _heard(folder / EVENTS, on_event or silent), _signals_kept():
            _run(folder, count, flags)
    return dict(store.read_json(store.Run(Path(spec.runs) / spec.name).report))


def _run(folder: Path, count: int, flags: list[str]) -> None:
    """Run the processes to their end; raise what ended them otherwise."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    (logs := folder / "logs").mkdir()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0, monitor_interval=0.1,
        shutdown_timeout=GRACE,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=dict.fromkeys(range(1, count), Std.ALL)),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "luthier.flows.member", str(folder), *flags)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        raise _why(folder, count, codes) from None
    except SignalException as error:
        if told := _told(folder, count):
            raise told from None
        raise KeyboardInterrupt from error


def _why(folder: Path, count: int, codes: Mapping[int, int]) -> LuthierError:
    """Which of the failures came first in reason: a kill from outside, then what a process said itself."""
    for rank, code in codes.items():
        if code < 0 and -code != signal.SIGTERM:  # SIGTERM is how the agent stops the others
            what = f"process {rank + 1} of {count} was ended from outside ({signal.Signals(-code).name})"
            remedy = f"{RESUME}; SIGKILL often means that the memory is used up"
            return TrainingError(f"{what}; the others were stopped", remedy=remedy)
    rank = min(codes, default=0)
    unknown = f"process {rank + 1} of {count} ended with code {codes.get(rank)}; the others were stopped"
    return _told(folder, count) or TrainingError(unknown, remedy=RESUME)


def _told(folder: Path, count: int) -> LuthierError | None:
    """What a process has said before it ended; errors of our own before those that follow from a lost neighbour."""
    found = [store.read_json(path) for rank in range(count) if (path := folder / FAILED.format(rank)).exists()]
    found.sort(key=lambda told: told["kind"] == "LuthierError")
    return revived(found[0]) if found else None


def written(error: BaseException) -> dict[str, Any]:
    """An error as JSON; one that is not ours becomes a plain LuthierError."""
    if not isinstance(error, LuthierError):
        remedy = "LUTHIER_DEBUG=1 shows where; please report it"
        error = LuthierError(f"unexpected {type(error).__name__}: {error}", remedy=remedy)
    told = {"kind": type(error).__name__, "what": error.what, "where": error.where, "remedy": error.remedy}
    return {**told, "faults": [dataclasses.asdict(fault) for fault in error.faults]}


def revived(told: Mapping[str, Any]) -> LuthierError:
    """The error that `written` was given."""
    kind: type[LuthierError] = getattr(errors, told["kind"], LuthierError)
    faults = [Fault(**fault) for fault in told["faults"]]
    return kind(told["what"], where=told["where"], remedy=told["remedy"], faults=faults)


def packed(event: Event) -> str:
    """An event as a line of JSON."""
    return json.dumps([type(event).__name__, dataclasses.asdict(event)])


def unpacked(line: str) -> Event:
    """The event that `packed` was given."""
    name, told = json.loads(line)
    if name == "Progress":
        told["step"] = Step(**told["step"])
    event: Event = getattr(events, name)(**told)
    return event


@contextmanager
def _heard(path: Path, listener: Listener) -> Iterator[None]:
    """Inside, whatever is told at a socket reaches the listener, in a thread of its own."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen(1)

        def listen() -> None:
            try:
                told, _ = door.accept()
            except OSError:  # shut: nobody came
                return
            with told, told.makefile(encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n"):  # a killed process may leave half a line
                        listener(unpacked(line))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield
        finally:
            door.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The agent takes signals and speaks of them at length; afterwards all is as it was."""
    from torch.distributed.elastic.agent.server import api as agent
    from torch.distributed.elastic.multiprocessing import api as processes

    levels = {logger: logger.level for logger in (agent.logger, processes.logger)}
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for number, handler in before.items():
            signal.signal(number, handler)
