"""Ctrl-C and SIGTERM finish the step; a second one aborts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NOTICE = "\nluthier: finishing this step, then saving. Once more to stop at once.\n"


class Stop:
    """Whether someone asked for an end; `name` is the signal's."""

    def __init__(self) -> None:
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)


def _to_stderr(text: str) -> None:
    os.write(2, text.encode())  # print is not safe inside a handler: it may have interrupted a print


@contextmanager
def asked_to_stop(say: Callable[[str], None] = _to_stderr) -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a flag and the second into KeyboardInterrupt; handlers come back after.

    Outside the main thread signals cannot be caught; there the flag is simply never set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.name = signal.Signals(number).name
        say(NOTICE)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
