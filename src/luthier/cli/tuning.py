"""The verbs that tune and measure: each reads its arguments and hands them to its flow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.front import INTERRUPTED, AsJson, Overrides, RunName, Task, app, dump, out, report_to, watching
from luthier.errors import UsageError


@app.command()
def train(
    task: Task,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run was stopped")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="empty a run of that name first")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, train nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Tune, measure and report one task."""
    if dry_run:
        check(task, overrides, as_json)
        return
    from luthier import spec, store
    from luthier.errors import TrainingError

    asked = spec.load(task, overrides or ())
    from luthier.flows.team import is_first
    from luthier.flows.train import train as flow

    run = store.Run(Path(asked.runs) / asked.name)
    try:
        with watching() as listener:
            report = flow(asked, resume=resume, overwrite=overwrite, on_event=listener)
    except TrainingError as error:
        if run.record.exists() and store.read_json(run.record).get("status") == "interrupted":
            error.exit_code = INTERRUPTED
        raise
    if is_first():
        report_to(report, as_json, where=str(run.html))


@app.command()
def evaluate(
    run: RunName,
    data: Annotated[Path | None, typer.Option(help="other rows to judge by; the run's test rows by default")] = None,
    open_test: Annotated[bool, typer.Option("--open-test", help="show single test rows; the report says so")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run again, on its test rows or on others."""
    from luthier.flows.evaluate import evaluate as flow

    with watching() as listener:
        report = flow(run, data, open_test=open_test, on_event=listener)
    report_to(report, as_json)


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B")],
    as_json: AsJson = False,
) -> None:
    """Compare two tuned models on the same test rows."""
    from luthier.flows import screen
    from luthier.flows.compare import compare as flow

    found = flow(run_a, run_b)
    dump(found) if as_json else screen.print_comparison(found, out())


@app.command()
def report(
    run: RunName,
    as_json: AsJson = False,
    open_page: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Print a run's verdict and say where its page is."""
    from luthier import store

    found = store.open_run(run)
    if not found.report.exists():
        raise UsageError("has no report yet", where=str(found.folder), remedy="finish it: luthier train TASK --resume")
    report_to(store.read_json(found.report), as_json, where=str(found.html))
    if open_page:
        typer.launch(found.html.resolve().as_uri())


@app.command()
def check(task: Task, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Look through a task's rows, and forecast its cost.

    Ends with 2 where something must be mended before training.
    """
    from luthier import spec
    from luthier.flows import check as flow

    with watching() as listener:
        checked = flow.check(spec.load(task, overrides or ()), on_event=listener)
    dump(checked.as_dict()) if as_json else flow.print_checked(checked, out())
    if checked.faults:
        raise typer.Exit(2)


@app.command()
def show(
    task: Task,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="how many rows", min=1)] = 3,
    side: Annotated[str, typer.Option(help="train, dev or test")] = "train",
    as_json: AsJson = False,
) -> None:
    """Print rows as the model sees them, learnt parts in colour."""
    from luthier import spec
    from luthier.flows import show as flow

    shown = flow.show(spec.load(task, overrides or ()), rows=rows, side=side)
    dump(shown.as_dict()) if as_json else flow.print_shown(shown, out())


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="the folder to write task.yaml into", metavar="DIR")],
    data: Annotated[Path, typer.Option(help="your file of examples")],
    model: Annotated[str | None, typer.Option(help="the base model; chosen by the data's language by default")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at your file and write a task for it, with reasons."""
    from luthier.flows.init import init as flow

    told = flow(folder, data, model=model)
    if as_json:
        dump(told)
        return
    print(Path(told["task"]).read_text("utf-8"))
    print(f"Written to {told['task']}. Next: {told['next']}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="one method, in plain words", metavar="[NAME]")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="the table as Markdown")] = False,
    as_json: AsJson = False,
) -> None:
    """List the ways of tuning, or tell about one."""
    from luthier.flows import methods as flow

    told = flow.page(name) if name else flow.table()
    if as_json:
        dump(told)
    elif markdown and isinstance(told, list):
        print(flow.markdown(told))
    elif isinstance(told, dict):
        flow.print_page(told, out())
    else:
        flow.print_table(told, out())


@app.command()
def plan(
    task: Task,
    overrides: Overrides = None,
    fits: Annotated[str | None, typer.Option(help="propose settings for so much memory, such as 24GB")] = None,
    shape: Annotated[str | None, typer.Option(help="plan for a model that is not here, such as llama-7b")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; what the task asks for by default")] = None,
    as_json: AsJson = False,
) -> None:
    """Forecast memory and time before anything is loaded."""
    from luthier import spec
    from luthier.flows import fitting
    from luthier.flows import plan as flow

    with watching() as listener:
        planned = flow.plan(
            spec.load(task, overrides or ()),
            fits=fitting.parse_size(fits) if fits else None,
            shape=shape,
            device=device,
            on_event=listener,
        )
    dump(planned.as_dict()) if as_json else flow.print_planned(planned, out())


@app.command("find-lr")
def find_lr(task: Task, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Search the learning rate that suits a task's method."""
    from luthier import spec
    from luthier.flows import find_lr as flow

    with watching() as listener:
        found = flow.find_lr(spec.load(task, overrides or ()), on_event=listener)
    dump(found) if as_json else flow.print_found(found, out())


study = typer.Typer(help="Experiments that compare, fairly: which method suits the task.", rich_markup_mode=None)
app.add_typer(study, name="study")


@study.command("methods")
def study_methods(
    task: Task,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="names, with commas between")
    ] = "lora,ia3,bottleneck,prompt,bitfit,layers,full",
    budget: Annotated[str | None, typer.Option(help="time to spend, such as 45m or 2h")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each of the best methods", min=1)] = 3,
    top: Annotated[int, typer.Option(help="how many methods are run with every seed", min=1)] = 4,
    limit_test: Annotated[int | None, typer.Option(help="judge only so many test rows", min=1)] = None,
    ray: Annotated[str | None, typer.Option(help="a Ray cluster's address, or local")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods on your task: a search for each, seeds, one test.

    The same command goes on where it was stopped.
    """
    from luthier import spec
    from luthier.flows import study as flow

    with watching() as listener:
        report = flow.study_methods(
            spec.load(task, overrides or ()),
            methods=[name.strip() for name in methods.split(",") if name.strip()],
            budget=flow.seconds_of(budget) if budget else None,
            seeds=seeds,
            top=top,
            limit=limit_test,
            ray=ray,
            on_event=listener,
        )
    dump(report) if as_json else flow.print_study(report, out())
