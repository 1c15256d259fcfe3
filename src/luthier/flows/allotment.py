"""A study's plan and clock, kept on disk: what was asked, what parts cost, what is done, what was said.

A killed study goes on with the plan that it had, so that its trials are the ones that are finished already.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import store
from luthier.errors import UsageError
from luthier.evaluate.wording import lasting
from luthier.flows.calibrate import Measured
from luthier.flows.events import Listener, Note, Studied
from luthier.training import budget
from luthier.training.budget import Closing, Cost, Shape

ROOM = 0.95  # of a budget that is planned; the rest is for what no plan foresees
RICHEST = 6  # rates of a search that lacks no time
OVERRUN = 1.1  # further seeds are given up where they would end beyond this share of the budget


class Allotment:
    """Seconds, and how they are shared out. `seconds` is the budget; None: as long as it takes."""

    def __init__(self, path: Path, request: Mapping[str, Any], seconds: float | None, tell: Listener) -> None:
        self._path, self._tell, self._began = path, tell, time.monotonic()
        told = store.read_json(path) if path.exists() else {}
        request = {**request, "budget": seconds}
        self._kept: dict[str, Any] = told if told.get("request") == request else {"request": request, "said": []}
        self._before: float = self._kept.get("spent", 0.0)
        self.seconds = seconds
        self.ahead = self._behind = self._actual = 0.0  # planned seconds to come; planned and real seconds done
        self.done = self.total = 0

    @property
    def spent(self) -> float:
        """Seconds that the study has taken, those before a kill included."""
        return self._before + time.monotonic() - self._began

    @property
    def said(self) -> list[str]:
        """What was given up, in sentences."""
        return list(self._kept["said"])

    def save(self, **facts: Any) -> None:
        """Keep facts and the clock."""
        self._kept |= facts
        store.write_json(self._path, {**self._kept, "spent": self.spent})

    def say(self, text: str) -> None:
        """Tell of something that a reader of the report should know, once."""
        if text not in self._kept["said"]:
            self.save(said=[*self._kept["said"], text])
            self._tell(Note(text, "warning"))

    def measured(self) -> tuple[dict[str, Measured], Closing] | None:
        """What the parts cost, as measured before a kill."""
        told = self._kept.get("measured")
        if told is None:
            return None
        methods = {
            label: Measured(Cost(**one["cost"]) if one["cost"] else None, one["memory"], one["why"])
            for label, one in told["methods"].items()
        }
        return methods, Closing(**told["closing"])

    def keep_measured(self, methods: Mapping[str, Measured], closing: Closing) -> None:
        """Keep what the parts cost."""
        told = {label: dataclasses.asdict(one) for label, one in methods.items()}
        self.save(measured={"methods": told, "closing": dataclasses.asdict(closing)})

    def plan(
        self, key: str, full: int, seeds: int, top: int, costs: Mapping[str, Cost], after: Closing, *,
        looks_every: int, width: int, searched: Shape | None = None,
    ) -> Shape:  # fmt: skip
        """The shape of the study within its budget (of the rest of it, once `searched`); UsageError where none fits."""
        if key in self._kept:
            shape = Shape.of_json(self._kept[key])
        else:
            room = float("inf") if self.seconds is None else ROOM * self.seconds - self.spent
            fitting = budget.fit(
                room, full, seeds, top, costs, after, looks_every=looks_every, width=width, search_as=searched
            )  # fmt: skip
            if fitting is None and searched is None:
                raise self._too_little(full, costs, after, looks_every, width)
            poorest = Shape(0, (), min(full, budget.LEAST_STEPS), 1, top)
            shape = fitting or dataclasses.replace(poorest, rates=searched.rates, lengths=searched.lengths)  # type: ignore[union-attr]
            self.save(**{key: shape.as_json()})
        self.ahead = budget.forecast(
            shape, costs, after, looks_every=looks_every, width=width, searched=searched is not None
        )  # fmt: skip
        self._behind = self._actual = 0.0
        return shape

    def left(self) -> float:
        """Seconds to come, by the plan and by how true it has been since it was made."""
        drift = self._actual / self._behind if self._behind > 1 and self._actual else 1.0
        return max(0.0, self.ahead - self._behind) * drift

    def fits(self, seconds: float) -> bool:
        """Whether so many more seconds stay within the budget, with what may run over."""
        return self.seconds is None or self.spent + seconds <= OVERRUN * self.seconds

    def did(self, trial: str, planned: float, actual: float) -> None:
        """A trial is done; `planned` and `actual` are its seconds (actual 0: it was kept from before)."""
        self.done += 1
        self.total = max(self.total, self.done)
        self._behind += planned
        self._actual += actual or planned
        self.save()
        self._tell(Studied(trial, self.done, self.total, self.left()))

    def _too_little(
        self, full: int, costs: Mapping[str, Cost], after: Closing, looks_every: int, width: int
    ) -> UsageError:
        needed = budget.least(full, costs, after, looks_every=looks_every, width=width) / ROOM + self.spent
        return UsageError(
            f"is too short: measuring took {lasting(self.spent)}, and the smallest study of {len(costs)} methods with "
            f"a search for their rates takes about {lasting(needed)} on this machine",
            where="--budget",
            remedy="give it that, name fewer methods, or judge fewer test rows with --limit-test",
        )


def plan_in_words(shape: Shape, methods: int, seconds: float, budget: float | None) -> str:
    """What will be done, in a sentence."""
    if shape.rates > 1:
        rungs = ", ".join(map(str, shape.lengths))
        search = f"{shape.rates} learning rates for each of {methods} methods (rungs of {rungs} steps), then "
    else:
        search = f"no search: each of {methods} methods at its own default rate; "
    within = f" of {lasting(budget)}" if budget else ""
    return f"{search}{runs_in_words(shape, methods)}: about {lasting(seconds)}{within}"


def runs_in_words(shape: Shape, methods: int) -> str:
    """The full-length runs of a plan."""
    seeds = f"{shape.seeds} seeds for the best {min(shape.top, methods)}" if shape.seeds > 1 else "one seed"
    return f"full runs of {shape.full} steps, {seeds}"


def given_up(shape: Shape, full: int, seeds: int) -> list[str]:
    """What the budget did not allow, in sentences."""
    told = []
    if shape.rates == 1:
        told.append("The budget allowed no search: every method ran at its own default learning rate.")
    elif shape.rates < RICHEST:
        told.append(f"The budget allowed {shape.rates} learning rates a method, {RICHEST} with more time.")
    if shape.full < full:
        told.append(f"The budget allowed runs of {shape.full} of the task's {full} steps.")
    if shape.seeds < seeds:
        told.append(f"The budget allowed {shape.seeds} of {seeds} seeds.")
    return told
