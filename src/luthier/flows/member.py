"""python -m luthier.flows.member FOLDER: one of several processes of a run (`flows.launch` starts them)."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from luthier import spec as specs
from luthier import store
from luthier.errors import LuthierError
from luthier.flows import launch
from luthier.flows.events import Listener, silent
from luthier.flows.team import is_first
from luthier.flows.train import train

LOOK = 0.5  # seconds between looks at whether the starter lives


def main(arguments: Sequence[str]) -> int:
    """Run the task of a folder; an error is left there for the starter to raise."""
    folder, flags = Path(arguments[0]), arguments[1:]
    _end_with(os.getppid())
    try:
        spec = specs.build(store.read_json(folder / launch.TASK))
        with _speaking(folder / launch.EVENTS) as tell:
            train(spec, resume="--resume" in flags, overwrite="--overwrite" in flags, on_event=tell)
    except Exception as error:
        if os.environ.get("LUTHIER_DEBUG") == "1":
            traceback.print_exc()
        store.write_json(folder / launch.FAILED.format(os.environ["RANK"]), launch.written(error))
        return error.exit_code if isinstance(error, LuthierError) else 1
    return 0


@contextmanager
def _speaking(path: Path) -> Iterator[Listener]:
    """Yield what the first process tells its events to; the others are silent."""
    if not is_first():
        yield silent
        return
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        yield lambda event: line.sendall(f"{launch.packed(event)}\n".encode())


def _end_with(parent: int) -> None:
    """Finish the step and save when the process that started this one is gone: nobody else would ever stop it."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
