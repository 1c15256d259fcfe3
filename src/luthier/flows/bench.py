"""`luthier bench train`: how fast a task's training steps run here, against what this machine could do at most.

Steps are those of the run: its rows, packs, method and settings. Nothing is kept.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier import registry
from luthier.errors import LuthierError
from luthier.flows import train as flow
from luthier.flows.events import Listener, Note, Progress, Stage, silent
from luthier.flows.lower import keep_lower
from luthier.flows.prepare import Prepared, prepare
from luthier.records import Pack, Step
from luthier.spec import RunSpec

if TYPE_CHECKING:
    import torch

    from luthier.model.limit import Limit, Spread
    from luthier.training.loop import Training
    from luthier.training.profile import Seen, Watch
    from luthier.training.work import Rates

WARM = 1  # steps before any is measured: the first one chooses kernels
STEPS, WATCHED = 5, 3  # measured by default; watched for a profile
EPOCHS = 1e6  # no end of the data ends a measurement


@dataclass(frozen=True)
class Ran:
    """What the steps came to. `packs` run parallel to `steps`."""

    steps: Sequence[Step]
    packs: Sequence[Sequence[Pack]]
    rates: Rates
    watched: Sequence[Seen]
    limit: Limit


def train(
    spec: RunSpec, *, steps: int = STEPS, profile: bool = False, on_event: Listener | None = None
) -> dict[str, Any]:
    """Measure a task's training steps; every figure comes as median, least and most.

    With `profile` a few further steps are watched, operation by operation, and memory is told by kind. Raises SpecError
    or DataError for what keeps the task from running.
    """
    tell, begun = on_event or silent, time.perf_counter()
    prepared = prepare(spec, on_event=tell)
    rendering = time.perf_counter() - begun
    base, _ = flow.load_base(spec, prepared, tell)
    with _trained(spec, prepared, base, steps, profile, tell) as (training, watch, adapted):
        ran = _run(training, watch, adapted, steps, profile, tell)
        told = {
            "task": spec.name,
            "base": spec.model.name,
            "method": spec.method["name"],
            "machine": machine(base),
            "settings": {
                "batch_size": spec.train.batch_size, "tokens_per_pack": spec.train.tokens_per_pack,
                "checkpointing": spec.train.checkpointing, "warm_steps": WARM + 1,
            },
            **_figures(ran),
        }  # fmt: skip
    told["rendering"] = {"seconds": rendering, "rows": len(prepared.rendering.rendered)}
    told["profile"] = _profile(ran, prepared, tell) if profile else None
    return told


@contextlib.contextmanager
def _trained(
    spec: RunSpec, prepared: Prepared, base: Any, steps: int, profile: bool, tell: Listener
) -> Iterator[tuple[Training, Watch, Any]]:
    """The task's training, as long as the measurement, with a watch on it; the base is left as it was."""
    from luthier.training.loop import Training
    from luthier.training.profile import Watch, matrices

    total = WARM + 1 + steps + (WATCHED if profile else 0)
    own = matrices(base)
    method = registry.make("methods", spec.method, "method")
    adapted = method.attach(base, seed=spec.train.seed, evidence=flow.RunEvidence(base, prepared))
    shares = spec.train.share_prefixes and not prepared.separate
    lower = keep_lower(adapted.model, prepared, [], share=shares, tell=tell)  # as the whole run would
    settings = spec.train.model_copy(update={"max_steps": total, "epochs": EPOCHS, "patience": None})
    prepared.spec = spec.model_copy(update={"train": settings})
    training = Training(
        adapted, prepared.objective, prepared.feed(share=shares), settings, device=base.device, method=method,
        lower=lower,
    )  # fmt: skip
    try:
        yield training, Watch(training, adapted, own), adapted
    finally:
        adapted.detach()


def _run(training: Training, watch: Watch, adapted: Any, steps: int, profile: bool, tell: Listener) -> Ran:
    """Warm up, count one step, measure the limit, the steps, and the limit again; then watch some for a profile."""
    from luthier.model import limit
    from luthier.training import work

    device, dtype = training.device, adapted.model.dtype
    going = iter(training)
    tell(Stage("warm up", f"{WARM + 1} steps"))
    for _ in range(WARM):
        _next(going)
    with watch.watching() as seen:
        _next(going)
    rates = work.rates(seen, watch.packs, adapted)
    tell(Stage("measure the limit", f"{len(seen.base_products())} shapes of the base's matrices"))
    best = limit.measure(seen.base_products(), dtype=dtype, device=device)
    tell(Stage("measure", f"{steps} steps"))
    measured, packs = [], []
    for number in range(steps):
        measured.append(_next(going))
        packs.append(watch.packs)
        left = steps - number - 1
        tell(Progress(measured[-1], measured[-1].index + left, left * measured[-1].seconds))
    best = best.joined(limit.measure(seen.base_products(), dtype=dtype, device=device))
    watched = []
    for _ in range(WATCHED if profile else 0):
        with watch.watching() as seen:
            _next(going)
        watched.append(seen)
    return Ran(measured, packs, rates, watched, best)


def _next(going: Iterator[Step]) -> Step:
    """The next step; KeyboardInterrupt where the loop was asked to stop, since there is nothing to keep."""
    step = next(going, None)
    if step is None:
        raise KeyboardInterrupt
    return step


def _figures(ran: Ran) -> dict[str, Any]:
    from luthier.model.limit import Spread

    work = [ran.rates.of(packs) for packs in ran.packs]
    speeds = [sum(one.values()) / step.seconds for one, step in zip(work, ran.steps, strict=True)]
    limit = ran.limit.rate

    def over(values: Sequence[float]) -> dict[str, float]:
        return Spread.of(values).as_dict()

    def a_second(what: str) -> dict[str, float]:
        return over([getattr(step, what) / step.seconds for step in ran.steps])

    return {
        "steps": len(ran.steps),
        "seconds_a_step": over([step.seconds for step in ran.steps]),
        "rows_a_second": a_second("examples"),
        "tokens_a_second": a_second("plain_tokens"),
        "computed_tokens_a_second": a_second("tokens"),
        "gflop_a_step": over([sum(one.values()) / 1e9 for one in work]),
        "gflop_by_part": {part: sum(one.get(part, 0.0) for one in work) / len(work) / 1e9 for part in work[0]},
        "gflops": over([speed / 1e9 for speed in speeds]),
        "limit": _limit(ran.limit),
        "share_of_limit": over([speed / limit.median for speed in speeds]),
        "peak_bytes": max(step.memory for step in ran.steps),
        "gain": _gain(ran),
    }


def _limit(found: Limit) -> dict[str, Any]:
    """The limit as JSON, with every shape that it was measured on."""
    shapes = [
        {
            "rows": one.rows, "inner": one.inner, "columns": one.columns, "times": found.times[one],
            "gflops": scaled(speed, 1e-9),
        }
        for one, speed in found.products.items()
    ]  # fmt: skip
    return {"gflops": scaled(found.rate, 1e-9), "shapes": shapes}


def scaled(spread: Spread, factor: float) -> dict[str, float]:
    """A spread as JSON, in another unit."""
    told = spread.as_dict()
    return {name: value if name == "count" else value * factor for name, value in told.items()}


def _gain(ran: Ran) -> dict[str, Any]:
    """How much work is not done: by sharing, and by running the head only where something is predicted."""
    packs = [pack for step in ran.packs for pack in step]
    shared = sum(ran.rates.of(packs).values())
    apart = sum(ran.rates.separate(packs, everywhere=False).values())
    whole = sum(ran.rates.separate(packs, everywhere=True).values())
    count = len(ran.packs)
    return {
        "plain_tokens": sum(pack.plain_tokens for pack in packs) / count,
        "computed_tokens": sum(len(pack) for pack in packs) / count,
        "targets": sum(len(pack.target_ids) for pack in packs) / count,
        "less_work_by_sharing": apart / shared,
        "less_work_by_logits": whole / apart,
        "less_work": whole / shared,
    }


def _profile(ran: Ran, prepared: Prepared, tell: Listener) -> dict[str, Any]:
    """Where time and memory go. Parts add up to the watched step, which is a little slower than others."""
    from luthier.model.limit import Spread
    from luthier.training.profile import PARTS

    each = [seen.parts() for seen in ran.watched]
    names = [part for part in PARTS if any(part in one for one in each)]
    walls = [seen.wall for seen in ran.watched]
    parts = {
        part: {
            "seconds": Spread.of(one.get(part, 0.0) for one in each).as_dict(),
            "share": sum(one.get(part, 0.0) for one in each) / sum(sum(one.values()) for one in each),
        }
        for part in names
    }
    return {
        "seconds_a_step": Spread.of(walls).as_dict(),
        "operations_a_step": Spread.of(seen.operations for seen in ran.watched).as_dict(),
        "parts": parts,
        "memory": _memory(ran, prepared, tell),
    }


def _memory(ran: Ran, prepared: Prepared, tell: Listener) -> dict[str, Any] | None:
    """Memory of these steps by the plan's kinds; None, with a note, where the method cannot be rehearsed."""
    from luthier.flows.plan import Planner
    from luthier.training import memory

    spec, planner = prepared.spec, Planner(prepared)
    largest = max((pack for packs in ran.packs for pack in packs), key=len)
    tell(Stage("rehearse a step", "memory by kind"))
    try:
        bare = memory.bare(planner.config, planner.dtype, trust_remote_code=spec.model.trust_remote_code)
        method = registry.make("methods", spec.method, "method")
        rig = memory.rig(bare, method, device=planner.device, quantize=spec.quantize, total_steps=len(ran.steps))
        log = memory.rehearse_step(rig, largest, checkpointing=spec.train.checkpointing)
    except LuthierError as error:
        tell(Note(f"memory by kind is not known: {error}", "warning"))
        return None
    found = memory.gather(rig, {"tune": log}, spec.train)
    return {"parts": dict(found.parts), "peak_bytes": found.total}


def machine(model: Any) -> dict[str, Any]:
    """What decides how fast this model runs here."""
    import torch

    device = torch.device(model.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": str(device), "name": name,
        "capability": capability(device), "cores": cores(), "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__,
    }  # fmt: skip


def capability(device: torch.device) -> str:
    """What a device's kernels are chosen by: a CPU's vector instructions, or a GPU's generation."""
    import torch

    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
