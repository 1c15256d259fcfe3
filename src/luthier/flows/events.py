"""What a running flow tells whoever listens: a stage begins, a step is done, answers come in, something to note."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from luthier.records import Step


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the work begins: `name` is a short verb phrase, `detail` what it works on."""

    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """An optimiser step is done; `total` steps are planned and about `seconds_left` remain."""

    step: Step
    total: int
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Answering:
    """A system (`base`, `base_few_shot`, `tuned`) has answered `done` of `total` rows."""

    system: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Studied:
    """A study has finished `done` of about `total` trials; all of it will take about `seconds_left` more."""

    trial: str
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Note:
    """Something a person should know, without stopping the work."""

    text: str
    severity: Literal["info", "warning"] = "info"


Event = Stage | Progress | Answering | Studied | Note
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""
