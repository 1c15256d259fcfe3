"""`luthier check task.yaml`: everything worth knowing before training, with a forecast of its time and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.check import FAULT, WARNING, CheckReport, Finding
from luthier.data.check import check as look
from luthier.data.profile import Lengths
from luthier.data.split import SIDES
from luthier.errors import Fault
from luthier.evaluate.wording import lasting
from luthier.flows.events import Listener, Stage, silent
from luthier.flows.gather import gather
from luthier.flows.prepare import Prepared, assemble, limit_of, render_rows
from luthier.records import Rendered
from luthier.spec import RunSpec
from luthier.text import pack, show

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {FAULT: "bold red", WARNING: "yellow"}


@dataclass(frozen=True)
class Checked:
    """The findings, and what training would cost where nothing stands in its way."""

    spec: RunSpec
    report: CheckReport
    mask: Mapping[str, float]
    sharing: Mapping[str, float]
    hidden_system: str | None
    context: int | None
    forecast: Mapping[str, Any] | None

    @property
    def faults(self) -> list[Fault]:
        """What keeps the task from being trained as it stands."""
        return self.report.faults

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; the keys are stable."""
        return {
            "task": self.spec.name,
            **self.report.as_dict(),
            "mask": dict(self.mask),
            "sharing": dict(self.sharing),
            "hidden_system": self.hidden_system,
            "context": self.context,
            "forecast": dict(self.forecast) if self.forecast else None,
        }


def check(spec: RunSpec, *, forecast: bool = True, on_event: Listener | None = None) -> Checked:
    """Check a task's rows; raise SpecError or DataError only for what keeps them from being read at all."""
    tell = on_event or silent
    found = gather(spec, on_event=tell)
    limit = limit_of(spec.data, found.context)
    tell(Stage("check the rows", f"{len(found.examples)} rows"))
    rendering = render_rows(found, found.examples, skip=True)
    unrenderable = [fault for _, fault in rendering.refused]
    kept = {row.example_id for row in rendering.rendered}
    skips = spec.data.on_bad == "skip"
    report = look(
        {side: [example for example in getattr(found.sides, side) if example.id in kept] for side in SIDES},
        files=found.files,
        faults=[*found.bad, *(unrenderable if skips else ())],
        quarantined=found.sides.quarantined,
        lengths={row.example_id: _lengths(row) for row in rendering.rendered},
        limit=limit,
        truncate=spec.data.truncate,
        template=found.template.name,
        special=found.tokenizer.specials,
    )
    broken = [
        Finding(WARNING if skips else FAULT, "unrenderable", one.what, (one.where,), one.remedy, 1)
        for one in unrenderable
    ]
    report = dataclasses.replace(report, findings=[*broken, *report.findings])
    long = any(limit is not None and len(row.ids) > limit for row in rendering.rendered)
    ready = None if report.faults else assemble(found, [], None if long else rendering)
    if ready is not None and forecast:
        tell(Stage("rehearse a step", "without weights, and measure this machine"))
    packs = pack.plan(ready.rendered_train, budget=spec.train.tokens_per_pack, share=_shares(ready)) if ready else []
    shared = pack.sharing(packs)
    return Checked(
        spec=spec,
        report=report,
        mask=show.mask_summary(rendering.rendered),
        sharing={**dataclasses.asdict(shared), "factor": shared.factor},
        hidden_system=ready.hidden_system if ready else None,
        context=found.context,
        forecast=foresee(ready) if ready and forecast else None,
    )


def foresee(prepared: Prepared) -> dict[str, Any]:
    """What the run will cost on this machine: bytes, seconds, tokens."""
    from luthier.flows.plan import Planner

    planned = Planner(prepared).at(prepared.spec)
    forecast = planned.forecast
    return {
        **dataclasses.asdict(forecast),
        "sharing_factor": forecast.sharing_factor,
        "parameters": planned.parameters,
        "trainable": planned.trainable,
        "dtype": planned.dtype,
        "device": planned.device,
        "free_bytes": planned.free_bytes,
    }


def _lengths(row: Rendered) -> Lengths:
    return Lengths(row.prompt_length, len(row.ids) - row.prompt_length)


def _shares(prepared: Prepared) -> bool:
    return prepared.spec.train.share_prefixes and not prepared.separate


def print_checked(checked: Checked, console: Console) -> None:
    """Show it to a person: files, sides, findings, forecast."""
    from rich.table import Table
    from rich.text import Text

    files = Table("file", "rows", "bad", "format", "encoding", title="Files", title_justify="left")
    for info in checked.report.files:
        cells = (Path(info.path).name, info.rows, info.skipped, info.format, info.encoding)
        files.add_row(*(Text(show.visible(str(cell))) for cell in cells))
    console.print(files)
    sides = Table("side", "rows", "prompt tokens", "answer tokens", "longest", title="Sides", title_justify="left")
    for name, side in checked.report.sides.items():
        tokens = side["tokens"] or {}
        sides.add_row(
            name, str(side["rows"]), *(_spread(tokens.get(part)) for part in ("prompt", "answer")), _most(tokens)
        )
    console.print(sides)
    console.print(
        f"{checked.mask['share']:.1%} of all tokens are learnt (answers and their end token)"
        + (
            f"; shared prefixes: {checked.sharing['factor']:.1f} times fewer tokens to compute"
            if checked.sharing["computed_tokens"]
            else ""
        )
    )
    if checked.hidden_system:
        console.print(
            Text(f"The template adds a system message of its own: {show.visible(checked.hidden_system)}", "yellow")
        )
    for finding in checked.report.findings:
        _print_finding(finding, console)
    if not checked.report.findings:
        console.print("Nothing to mend.", style="green")
    if checked.forecast:
        console.print(Text(forecast_words(checked.forecast)))


def forecast_words(told: Mapping[str, Any]) -> str:
    """The forecast as a sentence."""
    low, high = told["seconds_low"], told["seconds_high"]
    gib = 2**30
    text = (
        f"Forecast: {told['steps']} steps and the answers take {lasting(low)} to {lasting(high)} on "
        f"{told['device']} ({told['dtype']}, {told['gigaflops']:.0f} GFLOP/s) and {told['peak_bytes'] / gib:.1f} to "
        f"{told['peak_bytes_high'] / gib:.1f} GiB of memory ({told['free_bytes'] / gib:.1f} GiB are free); "
        f"{told['trainable']:,} of {told['parameters']:,} parameters learn."
    )
    if told["peak_bytes_high"] > told["free_bytes"]:
        text += " It may not fit: `luthier plan` says what would."
    return text


def _print_finding(finding: Finding, console: Console) -> None:
    from rich.text import Text

    text = Text(f"{finding.severity}: {show.visible(finding.what)}", STYLES.get(finding.severity, "cyan"))
    if finding.remedy:
        text.append(f"\n  -> {show.visible(finding.remedy)}", "default not bold")
    for group in finding.groups[:5] or [finding.origins]:
        if group:
            listed = "; ".join(group[:8]) + (f" and {len(group) - 8} more" if len(group) > 8 else "")
            text.append(f"\n     {show.visible(listed)}", "dim not bold")
    console.print(text)


def _spread(told: Mapping[str, float] | None) -> str:
    return f"{told['median']:.0f} (p99 {told['p99']:.0f})" if told else ""


def _most(tokens: Mapping[str, Any]) -> str:
    return f"{tokens['total']['max']:.0f}" if tokens.get("total") else ""
