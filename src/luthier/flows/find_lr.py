"""`luthier find-lr task.yaml`: the search for the learning rate of the task's own method, alone.

Its trials are those of `study methods` and lie beside them, so one never repeats what the other has done.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier import registry, store
from luthier.errors import TrainingError
from luthier.evaluate import wording
from luthier.flows import calibrate, trials
from luthier.flows.allotment import Allotment
from luthier.flows.events import Listener, Note, Stage, silent
from luthier.flows.pools import Here
from luthier.flows.searching import count, search_all, search_told
from luthier.flows.trials import Bench
from luthier.spec import RunSpec
from luthier.text.show import visible
from luthier.training import budget
from luthier.training.budget import Shape

WIDTH = 40  # characters of a bar


def find_lr(spec: RunSpec, *, on_event: Listener | None = None) -> dict[str, Any]:
    """Search the rate of the task's method on its dev rows; return the curve, the rate and the override to use.

    Raises TrainingError where every rate diverges, SpecError where the method cannot be used on this base.
    """
    tell = on_event or silent
    asked = trials.resolve(spec, [spec.method["name"]])
    ((label, options),) = asked.items()
    method = registry.make("methods", options, "method")
    run = store.Run(Path(spec.runs) / f"{spec.name}-methods")
    with run.lock():
        bench = Bench.open(spec, run.folder, tell)
        clock = Allotment(run.folder / "find-lr.json", {"task": spec.model_dump(mode="json")}, None, tell)
        shape: Shape = next(budget.shapes(bench.full, 1, 1))
        cost = calibrate.timed(bench, label, options, tell)
        clock.total, clock.ahead = count(shape, 1), budget.searching(shape, cost)
        tell(
            Stage(
                "search the learning rate", f"{shape.rates} rates, rungs of {', '.join(map(str, shape.lengths))} steps"
            )
        )
        found, _ = search_all(asked, shape, {label: cost}, spec.train.seed, Here(bench), clock, tell)
    told = search_told(found[label])
    if told["rate"] is None:
        raise TrainingError("every rate diverged", remedy="look at the rows (luthier show); try model.dtype=float32")
    if told["at_edge"]:
        tell(Note("the best rate is the outermost that was tried; a better one may lie beyond", "warning"))
    return {
        "method": options,
        **told,
        "default": method.learning_rate,
        "bracket": list(method.bracket),
        "rungs": list(shape.lengths),
        "full_steps": bench.full,
        "seconds": clock.spent,
        "override": f"train.learning_rate={told['rate']:.2g}",
    }


def print_found(found: Mapping[str, Any], console: Console) -> None:
    """The curve as a table with bars, longest rung last, then the rate and how to use it."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("rate", "steps", "dev loss"):
        table.add_column(name, justify="right")
    table.add_column("")
    losses = [one["loss"] for one in found["curve"] if one["loss"] is not None]
    low, high = min(losses), max(losses)
    for one in sorted(found["curve"], key=lambda one: (one["steps"], one["rate"])):
        chosen = one["rate"] == found["rate"] and one["steps"] == max(found["rungs"])
        loss = "diverged" if one["loss"] is None else f"{one['loss']:.4f}"
        share = 0.0 if one["loss"] is None or high == low else (one["loss"] - low) / (high - low)
        bar = "" if one["loss"] is None else "▪" * max(1, round(WIDTH * share))
        table.add_row(f"{one['rate']:.2g}", str(one["steps"]), loss, bar + ("  best" if chosen else ""))
    console.print(table)
    name = visible(str(found["method"]["name"]))
    took = wording.lasting(found["seconds"])
    text = f"{name}: {found['rate']:.2g} (its default is {found['default']:.2g}), found in {took}"
    console.print(Text(text, "bold"))
    console.print(Text(f"Use it: {found['override']}"))
