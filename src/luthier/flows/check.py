"""`luthier check task.yaml`: everything worth knowing before training, with a forecast of its time and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import registry
from luthier.data.check import FAULT, WARNING, CheckReport, Finding
from luthier.data.check import check as look
from luthier.data.profile import Lengths
from luthier.data.split import SIDES
from luthier.errors import Fault
from luthier.flows.events import Listener, Stage, silent
from luthier.flows.gather import gather
from luthier.flows.prepare import Prepared, assemble, limit_of, render_rows
from luthier.records import Rendered
from luthier.spec import RunSpec
from luthier.text import pack, show
from luthier.training import plan
from luthier.training.feed import ShuffledFeed

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {FAULT: "bold red", WARNING: "yellow"}
WHOLE = 1 << 40  # epochs that no run reaches: max_steps decides


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
    rendering, unrenderable = render_rows(found, found.examples, skip=True)
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
        tell(Stage("measure this machine", "a quarter of a second of matrix products"))
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
    """What tuning will cost on this machine: bytes, seconds, tokens. Answering the held-out rows comes on top."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from luthier.model import load
    from luthier.model.quiet import quiet

    spec = prepared.spec
    device = load.pick_device(spec.model.device)
    dtype = load.pick_dtype(spec.model.dtype, device)
    config = AutoConfig.from_pretrained(prepared.model_folder, trust_remote_code=spec.model.trust_remote_code)
    with quiet(), torch.device("meta"):  # shapes without weights
        bare: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=spec.model.trust_remote_code
        )
        facts = plan.facts_of(bare)
        method = registry.make("methods", spec.method, "method")
        trainable = sum(weight.numel() for weight in method.attach(bare, seed=0).trainable().values())
    feed, settings = _feed(prepared), spec.train
    every = settings.eval_every or max(1, feed.steps_per_epoch // 2)
    dev = pack.plan(prepared.rendered_dev, budget=settings.tokens_per_pack, share=_shares(prepared))
    forecast = plan.plan(
        facts,
        trainable=trainable,
        work=plan.tally(feed),
        gigaflops=plan.measure(facts, dtype=dtype, device=device),
        checkpointing=settings.checkpointing,
        evaluations=-(-feed.total_steps // every),
        dev=plan.tally_packs(dev),
    )
    return {
        **dataclasses.asdict(forecast),
        "sharing_factor": forecast.sharing_factor,
        "parameters": facts.parameters,
        "trainable": trainable,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "free_bytes": free_memory(device),
    }


def free_memory(device: str) -> int:
    """Bytes that are free for training on a device now."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _lengths(row: Rendered) -> Lengths:
    return Lengths(row.prompt_length, len(row.ids) - row.prompt_length)


def _shares(prepared: Prepared) -> bool:
    return prepared.spec.train.share_prefixes and not prepared.separate


def _feed(prepared: Prepared) -> ShuffledFeed:
    """The run's feed; for a stream, one over its first rows that is as long as the run."""
    if prepared.stream is None:
        feed = prepared.feed(share=_shares(prepared))
        assert isinstance(feed, ShuffledFeed), "rows in memory are shuffled"
        return feed
    settings = prepared.spec.train
    return ShuffledFeed(
        [prepared.branches(example) for example in prepared.train],
        batch_size=settings.batch_size,
        seed=settings.seed,
        epochs=WHOLE,
        max_steps=settings.max_steps,
        budget=settings.tokens_per_pack,
        share=_shares(prepared),
    )


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
        f"Forecast: {told['steps']} steps of tuning take {_duration(low)} to {_duration(high)} on {told['device']} "
        f"({told['dtype']}, {told['gigaflops']:.0f} GFLOP/s) and {told['peak_bytes'] / gib:.1f} to "
        f"{told['peak_bytes_high'] / gib:.1f} GiB of memory ({told['free_bytes'] / gib:.1f} GiB are free); "
        f"{told['trainable']:,} of {told['parameters']:,} parameters learn. Answering the held-out rows comes on top."
    )
    if told["peak_bytes_high"] > told["free_bytes"]:
        text += " It may not fit: lower train.tokens_per_pack or set train.checkpointing: true."
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


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
