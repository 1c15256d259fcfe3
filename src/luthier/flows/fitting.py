"""Settings that fit into a given memory, cheapest change first, and a plan as a person reads it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from luthier import registry
from luthier import spec as specs
from luthier.errors import Fault, SpecError, TrainingError, UsageError
from luthier.evaluate.wording import lasting, size
from luthier.flows.plan import PARTS, Planned, Planner, Proposal
from luthier.spec import RunSpec
from luthier.training.plan import SPREAD, Forecast

if TYPE_CHECKING:
    from rich.console import Console

ENOUGH = 3  # proposals
MOST_PLANS = 14  # rehearsals that a search may cost
LEAST_PACK, LEAST_ROWS, LEAST_RANK = 256, 4, 4
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
STAGES = {"tune": "tuning", "look": "dev losses", "answer": "answering held-out rows"}


def parse_size(text: str) -> int:
    """Bytes of a size such as 24GB, 24GiB or 800MB; UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise UsageError(f"'{text}' is not a size", where="--fits", remedy="write 24GB, 24GiB or 800MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def propose(planner: Planner, spec: RunSpec, planned: Planned, limit: int) -> tuple[list[Proposal], list[str]]:
    """Plan changed settings until some fit; where none does, notes say how far the smallest is."""
    found: list[Proposal] = []
    smallest: Planned | None = None
    for overrides, note in itertools.islice(_candidates(spec, planned, limit), MOST_PLANS):
        try:
            tried = planner.at(changed(spec, overrides))
        except (SpecError, TrainingError):  # the method refuses this base, or the settings do not go together
            continue
        if smallest is None or tried.forecast.peak_bytes < smallest.forecast.peak_bytes:
            smallest = tried
        if tried.forecast.peak_bytes_high <= limit:
            slower = _effort(tried) / _effort(planned)
            found.append(Proposal(tuple(overrides), tried.forecast.peak_bytes, tried.forecast.seconds, slower, note))
        if len(found) == ENOUGH:
            break
    found.sort(key=lambda one: (len(one.note) > 0, one.slower))
    return found, [] if found or smallest is None else [_short(smallest)]


def _effort(planned: Planned) -> float:
    """Seconds, or operations where they are not known."""
    told = planned.forecast
    return sum(told.flops.values()) if told.seconds is None else told.seconds


def changed(spec: RunSpec, overrides: Sequence[str]) -> RunSpec:
    """The task with `a.b=c` overrides; SpecError with what does not go together."""
    tree = spec.model_dump(mode="json")
    faults: list[Fault] = []
    for one in overrides:
        if one.startswith("method="):  # another method has other options
            tree["method"] = {"name": one.partition("=")[2]}
        else:
            faults += specs.override_with(tree, one)
    return specs.build(tree, spec.name, faults=faults)


def _candidates(spec: RunSpec, planned: Planned, limit: int) -> Iterator[tuple[list[str], str]]:
    """Changes that cost little before changes that cost more; the last ones change what is learned."""
    over = {phase for phase, size in planned.memory.phases.items() if size * (1 + SPREAD) > limit}
    fewer = [f"evaluate.batch_size={max(LEAST_ROWS, spec.evaluate.batch_size // 4)}"] if "answer" in over else []
    steps = _step_changes(spec) if "tune" in over else [[]]
    yield from (([*step, *fewer], "") for step in steps if [*step, *fewer])
    packed = ["quantize=nf4"] if _may_be_packed(spec) else []
    if packed:
        yield from (
            ([*packed, *step, *fewer], "the base in 4 bits: a little less exact") for step in _spread([[], *steps])
        )
    optimizer = ["train.optimizer=paged_adamw8bit"] if planned.device.startswith("cuda") else []
    smallest = [*steps[-1], *fewer, *optimizer]
    rank = spec.method.get("rank", 16 if spec.method["name"] == "lora" else None)
    if rank and rank > LEAST_RANK:
        yield [f"method.rank={max(LEAST_RANK, rank // 4)}", *packed, *smallest], "a smaller rank"
    for name in ("lora", "ia3"):
        if name != spec.method["name"] and name in registry.names("methods"):
            yield [f"method={name}", *steps[0], *fewer], f"another method: {name}"
            yield [f"method={name}", *smallest, "quantize=nf4"], f"another method: {name}"


def _step_changes(spec: RunSpec) -> list[list[str]]:
    """Changes of a training step that leave its result as it is but for rounding."""
    largest = spec.train.tokens_per_pack
    sizes = [size for size in (largest // 2, largest // 4, largest // 8) if size >= LEAST_PACK]
    packs = [[f"train.tokens_per_pack={size}"] for size in sizes]
    if spec.train.checkpointing:
        return packs or [[]]
    again = ["train.checkpointing=true"]
    return [*packs[:2], again, *([*pack, *again] for pack in packs[1:])]


def _spread(choices: list[list[str]]) -> list[list[str]]:
    """The first, the middle and the last of many."""
    places = sorted({0, len(choices) // 2, len(choices) - 1})
    return [choices[place] for place in places]


def _may_be_packed(spec: RunSpec) -> bool:
    """Methods that change the base's own matrices cannot learn on packed ones."""
    about = registry.find("methods", spec.method["name"]).about  # type: ignore[attr-defined]
    return spec.quantize.name == "none" and about.family in ("reparametrised", "additive")


def _short(smallest: Planned) -> str:
    base = sum(smallest.memory.parts.get(part, 0) for part in ("runtime", "weights", "constants"))
    needs = size(smallest.forecast.peak_bytes_high)
    return (
        f"nothing that was tried fits: the smallest needs {needs} with reserve, of which {size(base)} are the base "
        f"and the libraries themselves; take a smaller base, or {needs} of memory"
    )


def show(planned: Planned, console: Console) -> None:
    """Print a plan."""
    from rich.table import Table
    from rich.text import Text

    told = planned.forecast
    title = f"Memory of {planned.base} with {planned.method} on {planned.device} ({planned.dtype})"
    table = Table("part", "", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for part, count in planned.memory.parts.items():
        table.add_row(PARTS.get(part, part), size(count))
    table.add_row("at the worst moment", size(told.peak_bytes), style="bold")
    console.print(table)
    room = planned.limit if planned.limit is not None else planned.free_bytes
    if room is not None:
        verdict = "it fits" if planned.fits else "it may not fit"
        allowed = f"{'allowed' if planned.limit else 'free'} {size(room)}"
        words = f"With reserve {size(told.peak_bytes_high)}, {allowed}: {verdict}."
        console.print(Text(words, "green" if planned.fits else "bold red"))
    _show_time(told, console)
    console.print(
        f"{told.steps} steps; shared prefixes: {told.sharing_factor:.1f} times fewer tokens; {planned.trainable:,} of "
        f"{planned.parameters:,} parameters learn; the adapter takes {size(planned.adapter_bytes)} on disk."
    )
    _show_proposals(planned, console)
    for note in planned.notes:
        console.print(Text(note, "yellow"))


def _show_time(told: Forecast, console: Console) -> None:
    if told.seconds_low is None or told.seconds_high is None:
        console.print(f"{sum(told.flops.values()) / 1e15:.2f} PFLOP in all")
        return
    stages = (f"{STAGES[name]} {lasting(low)} to {lasting(high)}" for name, (low, high) in told.stages.items())
    console.print(
        f"Time: {lasting(told.seconds_low)} to {lasting(told.seconds_high)} at {told.gigaflops:.0f} GFLOP/s measured "
        f"({', '.join(stages)})"
    )


def _show_proposals(planned: Planned, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if not planned.proposals:
        return
    table = Table("settings", "peak", "time", "", title="What fits", title_justify="left")
    for one in planned.proposals:
        price = f"{one.slower:.1f} times" if one.seconds is None else f"{lasting(one.seconds)} ({one.slower:.1f} times)"
        cells = (" ".join(one.overrides), size(one.peak_bytes), price, one.note)
        table.add_row(*map(Text, cells))
    console.print(table)
