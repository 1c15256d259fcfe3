"""What a person sees in a terminal while a flow runs, and the verdict at its end. Texts from data are made harmless."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from luthier.evaluate import wording
from luthier.flows import events
from luthier.flows.events import Answering, Event, Listener, Note, Stage, Studied
from luthier.text.show import visible

EVERY = 5.0  # seconds between plain lines


@contextmanager
def watching(console: Console) -> Iterator[Listener]:
    """Show events on a console: bars on a terminal, a plain line every few seconds elsewhere."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    with _Bars(console) as bars:
        yield bars


class _Lines:
    """One line for each stage and note, and one every few seconds for steps and answers."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stage):
            self._say(f"{event.name}: {event.detail}" if event.detail else event.name)
        elif isinstance(event, Note):
            self._say(f"{event.severity}: {event.text}")
        elif _ends(event) or time.monotonic() - self._last > EVERY:
            self._last = time.monotonic()
            self._say(_words(event))

    def _say(self, text: str) -> None:
        self._console.print(Text(visible(text)), soft_wrap=True)


class _Bars:
    """A bar for steps and one for answers; stages and notes scroll above them."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stage):
            self._clear()
            text = Text(visible(event.name), "bold")
            self._progress.console.print(text.append(f"  {visible(event.detail)}", "not bold dim"))
        elif isinstance(event, Note):
            style = "yellow" if event.severity == "warning" else "cyan"
            self._progress.console.print(Text(visible(event.text), style))
        elif isinstance(event, Answering):
            self._show(event.system.replace("_", " "), event.done, event.total, "")
        elif isinstance(event, Studied):
            self._progress.console.print(Text(visible(_words(event)), "dim"))
        else:
            self._show("steps", event.step.index, event.total, f"{_facts(event)}  {_left(event.seconds_left)} left")

    def _show(self, name: str, done: int, total: int, facts: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, facts=facts)
        self._progress.update(self._tasks[name], completed=done, total=total, facts=facts)

    def _clear(self) -> None:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks = {}


def _ends(event: Event) -> bool:
    if isinstance(event, Studied):
        return True
    if isinstance(event, Answering):
        return event.done == event.total
    return isinstance(event, events.Progress) and event.step.index in (1, event.total)


def _words(event: Event) -> str:
    if isinstance(event, Answering):
        return f"{event.system.replace('_', ' ')}: {event.done}/{event.total} answers"
    if isinstance(event, Studied):
        return f"trial {event.done}/{event.total}: {event.trial}  {_left(event.seconds_left)} left"
    assert isinstance(event, events.Progress)
    return f"step {event.step.index}/{event.total}  {_facts(event)}  {_left(event.seconds_left)} left"


def _facts(event: events.Progress) -> str:
    step = event.step
    dev = f"  dev {step.dev_loss:.4f}" if step.dev_loss is not None else ""
    return f"loss {step.loss:.4f}{dev}  {step.plain_tokens / max(step.seconds, 1e-9):,.0f} tokens/s"


def _left(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_report(report: Mapping[str, Any], console: Console, *, where: str = "") -> None:
    """The verdict, every system's scores with their intervals, transitions, red guards, and where to read on."""
    labels, metrics = report["labels"], list(report["metrics"])
    table = Table("", *metrics, title_justify="left")
    for name, system in report["systems"].items():
        table.add_row(labels.get(name, name), *(_score(system["scores"].get(metric)) for metric in metrics))
    console.print(table)
    counts = report["transitions"]
    console.print(
        f"{counts['fixed']} fixed, {counts['broken']} broken, {counts['kept']} still right, {counts['stuck']} still "
        f"wrong ({report['transitions_rule']}); smallest detectable gain "
        f"{wording.points(report['smallest_detectable_gain'], sign=False)} points"
    )
    print_guards(report["systems"], labels, console)
    sharing = report.get("sharing")
    if sharing:
        console.print(
            f"{sharing['ratio']:.1f} times fewer tokens computed by sharing prefixes, "
            f"{sharing['examples_per_second'] or 0:.1f} rows a second"
        )
    console.print(Text(report["sentence"], "bold"))
    if where:
        console.print(Text(f"Report: {where}"), soft_wrap=True)


def print_guards(systems: Mapping[str, Any], labels: Mapping[str, str], console: Console) -> None:
    """Name the guards that are red: answers that are broken rather than wrong."""
    for name, system in systems.items():
        for guard in system["guards"].values():
            if guard["red"]:
                share = wording.percent(guard["share"], 0)
                console.print(Text(f"{labels.get(name, name)}: {share} of the answers: {guard['meaning']}", "red"))


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """Two runs side by side."""
    table = Table("", *found["metrics"], title_justify="left")
    for side in ("a", "b"):
        key = "base" if side == "a" else "tuned"
        scores = (
            {"value": one[key], "low": one[f"{key}_interval"][0], "high": one[f"{key}_interval"][1]}
            for one in found["metrics"].values()
        )
        table.add_row(found[side]["name"], *map(_score, scores))
    console.print(table)
    console.print(Text(found["sentence"], "bold"))


def print_rows(rows: Sequence[Mapping[str, Any]], console: Console, *, empty: str) -> None:
    """Rows with equal keys as a table."""
    if not rows:
        console.print(empty)
        return
    table = Table(box=box.SIMPLE_HEAD)
    for place, key in enumerate(rows[0]):
        table.add_column(str(key).replace("_", " "), no_wrap=place == 0)
    for row in rows:
        table.add_row(*(Text(visible(_cell(value))) for value in row.values()))
    console.print(table)


def _score(told: Mapping[str, float] | None) -> str:
    if told is None:
        return ""
    low, high = wording.percent(told["low"]), wording.percent(told["high"])
    return f"{wording.percent(told['value'])} ({low} to {high})"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:,}" if isinstance(value, int) else str(value)
