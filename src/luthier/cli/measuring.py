"""The verb that measures speed: `luthier bench train|evaluate|generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.front import AsJson, Overrides, Task, app, dump, out, watching

bench = typer.Typer(help="Speed here: real steps and answers against what this machine can do.", rich_markup_mode=None)
app.add_typer(bench, name="bench")
Rounds = Annotated[int, typer.Option(help="how often the same is measured", min=1)]


@bench.command("train")
def bench_train(
    task: Task,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="steps that are measured, after two that warm up", min=1)] = 5,
    profile: Annotated[bool, typer.Option("--profile", help="say where time and memory go")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a task's training steps."""
    from luthier import spec
    from luthier.flows import bench as flow
    from luthier.flows import bench_screen as screen

    with watching() as listener:
        told = flow.train(spec.load(task, overrides or ()), steps=steps, profile=profile, on_event=listener)
    dump(told) if as_json else screen.print_train(told, out())


@bench.command("evaluate")
def bench_evaluate(
    task: Task,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="test rows that are answered", min=1)] = 64,
    rounds: Rounds = 3,
    as_json: AsJson = False,
) -> None:
    """Measure how fast the base answers a task's test rows."""
    from luthier import spec
    from luthier.flows import bench_answers as flow
    from luthier.flows import bench_screen as screen

    with watching() as listener:
        told = flow.evaluate(spec.load(task, overrides or ()), rows=rows, rounds=rounds, on_event=listener)
    dump(told) if as_json else screen.print_evaluate(told, out())


@bench.command("generate")
def bench_generate(
    task: Annotated[Path | None, typer.Argument(help="a task's YAML, for its prompts", metavar="[TASK]")] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="a model instead, with made-up prompts")] = None,
    batches: Annotated[str, typer.Option(help="rows that are answered together")] = "1,8,32",
    tokens: Annotated[int, typer.Option(help="new tokens of each row", min=2)] = 32,
    rounds: Rounds = 3,
    as_json: AsJson = False,
) -> None:
    """Measure reading prompts and making tokens, at several batch sizes."""
    from luthier import spec
    from luthier.flows import bench_answers as flow
    from luthier.flows import bench_screen as screen

    asked = spec.load(task, overrides or ()) if task else None
    with watching() as listener:
        told = flow.generate(
            asked, model=model, batches=flow.batch_sizes(batches), tokens=tokens, rounds=rounds, on_event=listener
        )
    dump(told) if as_json else screen.print_generate(told, out())
