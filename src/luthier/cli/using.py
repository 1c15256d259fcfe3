"""The verbs that use what was tuned, and those that tell about models, runs and this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from luthier import __version__
from luthier.cli.front import AsJson, Limit, RunName, Temperature, app, dump, lines, out, visible
from luthier.errors import UsageError

models = typer.Typer(help="Base models: list them, fetch one, say where it lies.", rich_markup_mode=None)
app.add_typer(models, name="models")


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
    prompts = [*(prompt or ()), *(lines(file) if file else ())]
    if not prompts:
        raise UsageError("there is nothing to answer", remedy="give --prompt TEXT or --file FILE")
    from luthier.flows.answer import generate as flow

    answers = flow(run, prompts, base=base, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if as_json:
        dump([{"prompt": p, "text": a.text, "stop": a.stop} for p, a in zip(prompts, answers, strict=True)])
        return
    for answer in answers:
        print(visible(answer.text))


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
        dump(told)
        return
    print(
        f"Written to {told['folder']}: folded into the base {told['base']}; merged and attached agree within "
        f"{told['largest_difference']:.2g} nats"
    )


@models.command("list")
def models_list(as_json: AsJson = False) -> None:
    """List the models that are known by name; a hub id, a folder or a .gguf file will do as well."""
    from luthier.flows import models as flow
    from luthier.flows import screen

    dump(flow.table()) if as_json else screen.print_rows(flow.short_table(), out(), empty="")


@models.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    revision: Annotated[str | None, typer.Option(help="a hub revision; a commit is exact")] = None,
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="I have read and accept its terms")] = False,
) -> None:
    """Fetch a model into the cache, from the first of its sources that has it."""
    from luthier.model import catalog

    def tell(text: str) -> None:
        print(visible(text), file=sys.stderr)

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
    dump(rows) if as_json else screen.print_rows(rows, out(), empty=f"No runs in {folder}.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a task's YAML, for editors."""
    from luthier import spec

    dump(spec.json_schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do and what is missing.

    Ends with 1 where something does not work.
    """
    from luthier.flows import doctor as flow
    from luthier.flows import screen

    items = flow.examine()
    dump(items) if as_json else screen.print_rows(items, out(), empty="")
    if not all(item["ok"] for item in items):
        raise typer.Exit(1)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    dump({"version": __version__}) if as_json else print(f"luthier {__version__}")
