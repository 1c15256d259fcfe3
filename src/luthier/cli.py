"""The command line: each verb reads its arguments and hands them to its flow. Nothing heavy is imported before that.

Exit codes: 0 fine, 1 it ran and failed, 2 wrong use (faulty data included), 3 a required proof failed, 130 Ctrl-C.
Results go to stdout, progress and errors to stderr; with `--json` stdout holds one JSON value, also for an error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier import __version__
from luthier.errors import LuthierError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED, STOPPED = 130, "stopped; what was saved is kept"
app = typer.Typer(
    name="luthier",
    help="Fine-tune a language model for one task, and learn honestly whether it helped.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 fine, 1 it ran and failed, 2 wrong use or faulty data, 3 a required proof failed.",
)
models = typer.Typer(help="Base models: list them, fetch one, say where it lies.", rich_markup_mode=None)
app.add_typer(models, name="models")

Task = Annotated[Path, typer.Argument(help="the task's YAML", metavar="TASK")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings such as method.rank=32", metavar="[KEY=VALUE]...")
]
RunName = Annotated[str, typer.Argument(help="a run's folder, or its name below runs/", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON with stable keys")]
Limit = Annotated[int, typer.Option(help="tokens an answer may have", min=1)]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token", min=0.0)]


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
    from luthier.flows.train import train as flow

    run = store.Run(Path(asked.runs) / asked.name)
    try:
        with _watching() as listener:
            report = flow(asked, resume=resume, overwrite=overwrite, on_event=listener)
    except TrainingError as error:
        if run.record.exists() and store.read_json(run.record).get("status") == "interrupted":
            error.exit_code = INTERRUPTED
        raise
    _report(report, as_json, where=str(run.html))


@app.command()
def evaluate(
    run: RunName,
    data: Annotated[Path | None, typer.Option(help="other rows to judge by; the run's test rows by default")] = None,
    open_test: Annotated[bool, typer.Option("--open-test", help="show single test rows; the report says so")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run again, on its test rows or on others."""
    from luthier.flows.evaluate import evaluate as flow

    with _watching() as listener:
        report = flow(run, data, open_test=open_test, on_event=listener)
    _report(report, as_json)


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
    _dump(found) if as_json else screen.print_comparison(found, _out())


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
    _report(store.read_json(found.report), as_json, where=str(found.html))
    if open_page:
        typer.launch(found.html.resolve().as_uri())


@app.command()
def check(task: Task, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Look through a task's rows, and forecast its cost.

    Ends with 2 where something must be mended before training.
    """
    from luthier import spec
    from luthier.flows import check as flow

    with _watching() as listener:
        checked = flow.check(spec.load(task, overrides or ()), on_event=listener)
    _dump(checked.as_dict()) if as_json else flow.print_checked(checked, _out())
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
    _dump(shown.as_dict()) if as_json else flow.print_shown(shown, _out())


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
        _dump(told)
        return
    print(Path(told["task"]).read_text("utf-8"))
    print(f"Written to {told['task']}. Next: {told['next']}")


@app.command()
def generate(
    run: RunName,
    prompt: Annotated[list[str] | None, typer.Option(help="a question; may be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="a text file with one question a line")] = None,
    base: Annotated[bool, typer.Option("--base", help="ask the bare base model, for comparison")] = False,
    max_new_tokens: Limit = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    as_json: AsJson = False,
) -> None:
    """Answer questions with a run's tuned model."""
    prompts = [*(prompt or ()), *(_lines(file) if file else ())]
    if not prompts:
        raise UsageError("there is nothing to answer", remedy="give --prompt TEXT or --file FILE")
    from luthier.flows.answer import generate as flow

    answers = flow(run, prompts, base=base, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if as_json:
        _dump([{"prompt": p, "text": a.text, "stop": a.stop} for p, a in zip(prompts, answers, strict=True)])
        return
    for answer in answers:
        print(_visible(answer.text))


@app.command()
def chat(run: RunName, max_new_tokens: Limit = 256, temperature: Temperature = 0.0) -> None:
    """Talk to a run's tuned model; an empty line ends it."""
    from luthier.flows.answer import chat as flow

    flow(run, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def export(
    run: RunName,
    merged: Annotated[Path, typer.Option(help="a new folder for the merged model", metavar="DIR")],
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one model, with a proof.

    Ends with 3 where the merged model answers otherwise than the attached adapter.
    """
    from luthier.flows.export import export as flow

    told = flow(run, merged)
    if as_json:
        _dump(told)
        return
    print(f"Written to {told['folder']}: merged and attached agree within {told['largest_difference']:.2g} nats")


@models.command("list")
def models_list(as_json: AsJson = False) -> None:
    """List the models that are known by name; a hub id, a folder or a .gguf file will do as well."""
    from luthier.flows import models as flow
    from luthier.flows import screen

    _dump(flow.table()) if as_json else screen.print_rows(flow.short_table(), _out(), empty="")


@models.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    revision: Annotated[str | None, typer.Option(help="a hub revision; a commit is exact")] = None,
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="I have read and accept its terms")] = False,
) -> None:
    """Fetch a model into the cache, from the first of its sources that has it."""
    from luthier.model import catalog

    def tell(text: str) -> None:
        print(_visible(text), file=sys.stderr)

    print(catalog.pull(name, revision=revision, accept_licence=accept_licence, progress=tell))


@models.command("path")
def models_path(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print the folder of a model that is here already."""
    from luthier.model import catalog

    folder = catalog.cached(name)
    if folder is None:
        raise UsageError(f"'{name}' is not here yet", remedy=f"luthier models pull {name}")
    print(folder)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="the folder that holds runs", metavar="[DIR]")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs here, newest first."""
    from luthier.flows import runs as flow
    from luthier.flows import screen

    rows = flow.table(folder)
    _dump(rows) if as_json else screen.print_rows(rows, _out(), empty=f"No runs in {folder}.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a task's YAML, for editors."""
    from luthier import spec

    _dump(spec.json_schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do and what is missing.

    Ends with 1 where something does not work.
    """
    from luthier.flows import doctor as flow
    from luthier.flows import screen

    items = flow.examine()
    _dump(items) if as_json else screen.print_rows(items, _out(), empty="")
    if not all(item["ok"] for item in items):
        raise typer.Exit(1)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    _dump({"version": __version__}) if as_json else print(f"luthier {__version__}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if os.environ.get("LUTHIER_DEBUG") != "1":
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries to each other, not to a user
    try:
        code = app(given, standalone_mode=False)
        if code == INTERRUPTED:
            print(STOPPED, file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("LUTHIER_DEBUG") == "1":
            traceback.print_exc()
        told = error if isinstance(error, LuthierError) else _foreign(error)
        _tell_error(told, as_json="--json" in given)
        sys.exit(told.exit_code)


def _foreign(error: Exception) -> LuthierError:
    """An error that is not ours in one sentence: wrong use that typer found, the machine's limits, or our own fault."""
    if hasattr(error, "format_message"):
        return UsageError(error.format_message(), remedy="luthier COMMAND --help lists what there is")
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return LuthierError(
            "the memory is used up", remedy="lower train.tokens_per_pack or set train.checkpointing: true"
        )
    if isinstance(error, OSError) and error.filename:
        return LuthierError(str(error.strerror or error), where=str(error.filename))
    remedy = "LUTHIER_DEBUG=1 shows where; please report it"
    return LuthierError(f"unexpected {type(error).__name__}: {error}", remedy=remedy)


def _tell_error(error: LuthierError, *, as_json: bool) -> None:
    """Tell of an error on stderr, and with `--json` on stdout as well."""
    if as_json:
        faults = [{"where": one.where, "what": one.what, "remedy": one.remedy} for one in error.faults]
        told = {"what": error.what, "where": error.where, "remedy": error.remedy, "exit_code": error.exit_code}
        _dump({"error": {**told, "faults": faults}})
    print(_visible(f"luthier: {error}"), file=sys.stderr)


def _report(report: dict[str, Any], as_json: bool, *, where: str = "") -> None:
    from luthier.flows import screen

    _dump(report) if as_json else screen.print_report(report, _out(), where=where)


def _watching() -> Any:
    from rich.console import Console

    from luthier.flows import screen

    return screen.watching(Console(stderr=True))


def _out() -> Console:
    from rich.console import Console

    return Console()


def _dump(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text("utf-8-sig").splitlines() if line.strip()]


def _visible(text: str) -> str:
    """Spell out what a terminal would act on; line ends stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
