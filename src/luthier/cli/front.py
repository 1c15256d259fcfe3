"""What every verb's command shares: the application, the kinds of argument, where results go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
app = typer.Typer(
    name="luthier",
    help="Fine-tune a language model for one task, and learn honestly whether it helped.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 fine, 1 it ran and failed, 2 wrong use or faulty data, 3 a required proof failed.",
)

Task = Annotated[Path, typer.Argument(help="the task's YAML", metavar="TASK")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings such as method.rank=32", metavar="[KEY=VALUE]...")
]
RunName = Annotated[str, typer.Argument(help="a run's folder, or its name below runs/", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON with stable keys")]
Limit = Annotated[int, typer.Option(help="tokens an answer may have", min=1)]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token", min=0.0)]


def report_to(report: dict[str, Any], as_json: bool, *, where: str = "") -> None:
    """Print a run's verdict, or its report as JSON."""
    from luthier.flows import screen

    dump(report) if as_json else screen.print_report(report, out(), where=where)


def watching() -> Any:
    """A listener that shows progress on stderr."""
    from rich.console import Console

    from luthier.flows import screen

    return screen.watching(Console(stderr=True))


def out() -> Console:
    """The console on stdout."""
    from rich.console import Console

    return Console()


def dump(value: Any) -> None:
    """Print one JSON value on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def lines(file: Path) -> list[str]:
    """The lines of a file that are not empty."""
    return [line for line in file.read_text("utf-8-sig").splitlines() if line.strip()]


def visible(text: str) -> str:
    """Spell out what a terminal would act on; line ends stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
