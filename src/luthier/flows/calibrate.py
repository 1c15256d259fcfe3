"""What a study's parts take on this machine: a few real steps of every method, before any plan is made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.errors import LuthierError, SpecError
from luthier.evaluate import speed
from luthier.flows import probe
from luthier.flows.events import Listener, Note, Stage
from luthier.flows.judge import Judge
from luthier.flows.trials import Bench, Trial
from luthier.training.budget import Closing, Cost

TIMED_STEPS = 4  # after one that chooses kernels
SAMPLED_ANSWERS = 32
MEMORY_SHARE = 0.1  # of a budget that measuring memory may take


@dataclass(frozen=True)
class Measured:
    """One method before it is studied. `cost` is None where it cannot be used on this base: `why` tells."""

    cost: Cost | None
    memory: int | None = None  # peak bytes of a process of its own
    why: str = ""


def method(bench: Bench, label: str, options: Mapping[str, Any], tell: Listener) -> Measured:
    """Time a method; one that cannot be used on this base is left out, with the reason."""
    try:
        return Measured(timed(bench, label, options, tell))
    except (LuthierError, ValueError) as error:  # PEFT refuses names of layers with a ValueError
        tell(Note(f"{label} is left out: {error}", "warning"))
        return Measured(None, why=str(error))


def memories(
    bench: Bench, methods: Mapping[str, Mapping[str, Any]], budget: float | None, tell: Listener
) -> dict[str, int | None]:
    """Peak bytes of each method in a process of its own; none of them where that takes too much of a short budget."""
    found: dict[str, int | None] = {}
    for label, options in methods.items():
        tell(Stage("measure", f"{label}: its memory, in a process of its own"))
        began = time.monotonic()
        try:
            found[label] = probe.peak_memory(bench, _short(bench, options))
        except LuthierError as error:
            tell(Note(f"the memory of {label} is not known: {error}", "warning"))
            found[label] = None
        if budget is not None and (time.monotonic() - began) * len(methods) > MEMORY_SHARE * budget:
            return dict.fromkeys(methods)
    return found


def closing(bench: Bench, judge: Judge) -> Closing:
    """Time the base on some dev rows and scale up; tuned models end sooner, so this errs on the safe side."""
    from luthier.model.generate import generate

    prompts = [row.ids[: row.prompt_length] for row in bench.dev[:SAMPLED_ANSWERS]]
    began = time.perf_counter()
    generate(
        bench.base, prompts, decode=lambda ids: "", stop_ids=judge.tokenizer.stop_ids,
        max_new_tokens=judge.max_new_tokens, batch_size=judge.settings.batch_size,
    )  # fmt: skip
    answers = (time.perf_counter() - began) * max(1.0, len(judge.examples) / len(prompts))
    one = speed.seconds(bench.base, prompts[: speed.PROMPTS])
    return Closing(answers=answers, others=4 * speed.ROUNDS * one + answers / 4)


def refuse_empty(measured: Mapping[str, Measured]) -> None:
    """Raise SpecError where no method can be used."""
    if not any(one.cost for one in measured.values()):
        raise SpecError("none of these methods can be used on this base", remedy=next(iter(measured.values())).why)


def timed(bench: Bench, label: str, options: Mapping[str, Any], tell: Listener) -> Cost:
    """Seconds of some real steps of a method, of a look at the dev rows, and of putting it on and taking it off."""
    from luthier.training.loop import Training

    trial = _short(bench, options)
    tell(Stage("time", f"{label}: {trial.steps} steps"))
    began = time.perf_counter()
    with bench.attached(trial) as (adapted, chosen, prepared):
        attached = time.perf_counter() - began
        settings = prepared.spec.train.model_copy(update={"eval_every": trial.steps, "patience": None})
        training = Training(
            adapted, prepared.objective, prepared.feed(share=bench.share), settings, device=adapted.model.device,
            dev_packs=bench.dev_packs, method=chosen,
        )  # fmt: skip
        looped = time.perf_counter()
        steps = [step.seconds for step in training]
        look = time.perf_counter() - looped - sum(steps)
        left = time.perf_counter()
    counted = steps[1:] or steps
    return Cost(sum(counted) / len(counted), look, attached + time.perf_counter() - left)


def _short(bench: Bench, options: Mapping[str, Any]) -> Trial:
    """A few steps at the lowest rate of the method's bracket, where none diverges."""
    from luthier import registry

    made = registry.make("methods", dict(options), "methods")
    return Trial(options, float(made.bracket[0]), bench.spec.train.seed, min(TIMED_STEPS + 1, bench.full))
