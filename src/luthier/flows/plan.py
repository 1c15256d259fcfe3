"""`luthier plan task.yaml`: what a run will cost in memory and time, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import registry, store
from luthier.flows import lower
from luthier.flows.events import Listener, Note, Stage, silent
from luthier.flows.judge import Judge
from luthier.flows.prepare import Prepared, prepare
from luthier.spec import RunSpec
from luthier.text import pack
from luthier.training import plan as costs
from luthier.training.feed import ShuffledFeed

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from luthier.training.memory import Memory

WHOLE = 1 << 40  # epochs that no run reaches: max_steps decides
FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PARTS = {
    "runtime": "interpreter and libraries",
    "weights": "weights of the base",
    "constants": "constants that unpack them",
    "adapter": "what learns",
    "aside": "kept aside for it (copies, fixed matrices)",
    "optimiser": "float32 master, gradient sum, moments",
    "unpacked": "one matrix, unpacked for its product",
    "lower": "states of frozen lower layers, kept for all epochs",
    "activations": "kept for the backward pass",
    "gradients": "gradients",
    "logits": "logits and their slope",
    "working": "passing results",
    "dev": "a look at the dev rows",
    "answers": "keys, values and states of answers",
    "checkpoint": "a checkpoint on its way to the disk",
    "holes": "holes in the allocator's memory",
    "loading": "the file beside its converted copy, while loading",
}


@dataclass(frozen=True)
class Proposal:
    """Settings that fit: overrides for the command line, what they need and what they cost in time."""

    overrides: tuple[str, ...]
    peak_bytes: int
    seconds: float | None
    slower: float  # times the seconds of the task as it stands
    note: str = ""


@dataclass(frozen=True)
class Planned:
    """What a run would cost. `limit` is what `--fits` asks for; `free_bytes` None where the device is not here."""

    name: str
    base: str
    method: str
    device: str
    dtype: str
    forecast: costs.Forecast
    memory: Memory
    parameters: int
    trainable: int
    adapter_bytes: int
    free_bytes: int | None
    limit: int | None = None
    proposals: tuple[Proposal, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool | None:
        """Whether the high end of the forecast stays within the limit, or else within what is free; None: unknown."""
        room = self.limit if self.limit is not None else self.free_bytes
        return None if room is None else self.forecast.peak_bytes_high <= room

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; the keys are stable."""
        return {
            "task": self.name,
            "base": self.base,
            "method": self.method,
            "device": self.device,
            "dtype": self.dtype,
            "memory": {
                "parts": dict(self.memory.parts),
                "phases": dict(self.memory.phases),
                "peak_bytes": self.forecast.peak_bytes,
                "peak_bytes_high": self.forecast.peak_bytes_high,
                "free_bytes": self.free_bytes,
                "limit_bytes": self.limit,
                "fits": self.fits,
            },
            "time": {
                "seconds": self.forecast.seconds,
                "seconds_low": self.forecast.seconds_low,
                "seconds_high": self.forecast.seconds_high,
                "stages": {name: list(span) for name, span in self.forecast.stages.items()},
                "steps": self.forecast.steps,
                "flops": dict(self.forecast.flops),
                "gigaflops": self.forecast.gigaflops,
            },
            "tokens": {
                "computed": self.forecast.tokens_computed,
                "plain": self.forecast.plain_tokens,
                "sharing_factor": self.forecast.sharing_factor,
            },
            "parameters": self.parameters,
            "trainable": self.trainable,
            "adapter_bytes": self.adapter_bytes,
            "proposals": [dataclasses.asdict(one) for one in self.proposals],
            "notes": list(self.notes),
        }


def plan(
    spec: RunSpec, *, fits: int | None = None, shape: str | None = None, device: str | None = None,
    on_event: Listener | None = None,
) -> Planned:  # fmt: skip
    """Plan a task's run; raise SpecError or DataError for what keeps it from running.

    `fits` is a limit in bytes: where the run exceeds it, `proposals` hold settings that do not. `shape` plans for a
    base of `model.shapes` that is not here (the task's own tokenizer counts its tokens), `device` for another device.
    """
    from luthier.flows import fitting

    tell = on_event or silent
    prepared = prepare(spec, on_event=tell)
    tell(Stage("rehearse a step", f"{shape or spec.model.name}, {spec.method['name']}, without weights"))
    planner = Planner(prepared, shape=shape, device=device)
    planned = planner.at(spec)
    if fits is None:
        return planned
    planned = dataclasses.replace(planned, limit=fits)
    if not planned.fits:
        tell(Stage("look for settings that fit", ""))
        found, notes = fitting.propose(planner, spec, planned, fits)
        planned = dataclasses.replace(planned, proposals=tuple(found), notes=(*planned.notes, *notes))
    for note in planned.notes:
        tell(Note(note, "warning"))
    return planned


class Planner:
    """Plans a task's rows for one base and device, under any settings that leave the rows as they are."""

    def __init__(self, prepared: Prepared, *, shape: str | None = None, device: str | None = None) -> None:
        from luthier.model import load, shapes

        spec = prepared.spec
        self.prepared, self.shape = prepared, shape
        asked = device or spec.model.device
        self.here = device is None or is_here(device)
        self.device = load.pick_device(asked) if self.here else asked
        dtype = "bfloat16" if spec.model.dtype == "auto" and not self.here else spec.model.dtype
        self.dtype: torch.dtype = load.pick_dtype(dtype, self.device)
        self.config: Any = shapes.config(shape) if shape else self._own_config()
        self.share = spec.train.share_prefixes and not prepared.separate
        self._speed: costs.Speed | None = None
        self._rigs: dict[str, Any] = {}
        self._logs: dict[tuple[Any, ...], Any] = {}  # what was rehearsed, for the settings that it depends on

    def _own_config(self) -> Any:
        from transformers import AutoConfig

        trust = self.prepared.spec.model.trust_remote_code
        return AutoConfig.from_pretrained(self.prepared.model_folder, trust_remote_code=trust)

    def at(self, spec: RunSpec) -> Planned:
        """Plan the run under these settings; SpecError where the method refuses the base."""
        from luthier.training import memory

        prepared, settings = dataclasses.replace(self.prepared, spec=spec), spec.train
        feed = feed_of(prepared, share=self.share)
        rig, which = self._rig(spec, feed.total_steps)
        work = costs.tally(feed)
        largest = work.largest
        assert largest is not None, "a feed has packs"
        logs = {
            "tune": self._once(
                (which, "tune", len(largest), settings.checkpointing),
                lambda: memory.rehearse_step(rig, largest, checkpointing=settings.checkpointing),
            ),
        }
        if self.device == "cpu":  # elsewhere it passes through the host's memory
            logs["save"] = memory.rehearse_save(rig, settings.optimizer)
        cost = costs.cost_of_packs(logs["tune"], largest, work)
        looks = self._looks(prepared, feed, (rig, which), work, logs)
        answers = self._answers(prepared, (rig, which), logs)
        found = memory.gather(
            rig, logs, settings, file_bytes=self._converted(spec), lower=self._lower(prepared, rig, which)
        )
        return Planned(
            name=spec.name,
            base=self.shape or spec.model.name,
            method=spec.method["name"],
            device=self.device,
            dtype=str(self.dtype).removeprefix("torch."),
            forecast=costs.plan(found, work, cost, speed=self.speed(spec), looks=looks, answers=answers),
            memory=found,
            parameters=rig.parameters,
            trainable=rig.trainable,
            adapter_bytes=rig.adapted.saved_bytes(),
            free_bytes=free_memory(self.device) if self.here else None,
            notes=self._notes(),
        )

    def _rig(self, spec: RunSpec, steps: int) -> tuple[Any, str]:
        """The base with the method on it, without numbers, and what it is known by."""
        from luthier.training import memory

        which = store.content_hash([spec.method, spec.quantize.model_dump()])
        if which not in self._rigs:
            model = memory.bare(self.config, self.dtype, trust_remote_code=spec.model.trust_remote_code)
            method = registry.make("methods", spec.method, "method")
            self._rigs[which] = memory.rig(model, method, device=self.device, quantize=spec.quantize, total_steps=steps)
        return self._rigs[which], which

    def _once(self, key: tuple[Any, ...], rehearse: Callable[[], Any]) -> Any:
        if key not in self._logs:
            self._logs[key] = rehearse()
        return self._logs[key]

    def speed(self, spec: RunSpec) -> costs.Speed | None:
        """This machine's speed on this base's matrices, measured once; None where the device is not here."""
        if self._speed is None and self.here:
            text = self.config.get_text_config()
            inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
            rows = (costs.ROWS, min(costs.ROWS, spec.evaluate.batch_size))
            self._speed = costs.Speed(
                *(costs.measure(text.hidden_size, inner, rows=n, dtype=self.dtype, device=self.device) for n in rows)
            )
        return self._speed

    def _looks(
        self, prepared: Prepared, feed: ShuffledFeed, rig: tuple[Any, str], work: costs.Tally, logs: dict[str, Any]
    ) -> costs.Cost:
        """What all dev losses cost; a dev pack larger than the training packs is rehearsed for its memory too."""
        from luthier.training import memory

        settings = prepared.spec.train
        dev = pack.plan(prepared.rendered_dev, budget=settings.tokens_per_pack, share=self.share)
        every = settings.eval_every or max(1, feed.steps_per_epoch // 2)
        total = costs.tally_packs(dev)
        if total.largest is None or work.largest is None:
            return costs.Cost()
        log, rehearsed = logs["tune"].first, work.largest
        if len(total.largest) > len(work.largest):
            rehearsed = total.largest
            log = self._once((rig[1], "look", len(rehearsed)), lambda: memory.rehearse_look(rig[0], rehearsed))
            logs["look"] = log
        return costs.cost_of_packs(log, rehearsed, total) * -(-feed.total_steps // every)

    def _lower(self, prepared: Prepared, rig: Any, which: str) -> int:
        """Bytes of frozen lower layers' states that the run would keep; on a device that is not here, none."""
        if not self.here:
            return 0
        settings = prepared.spec.train
        dev = pack.plan(prepared.rendered_dev, budget=settings.tokens_per_pack, share=self.share)
        room = lower.memory(self.device)
        key = (
            which,
            "lower",
            settings.tokens_per_pack,
            settings.keep_lower_states,
            settings.epochs,
            settings.max_steps,
        )
        kept: int = self._once(key, lambda: lower.foreseen(rig.model, prepared, dev, share=self.share, room=room))
        return kept

    def _answers(
        self, prepared: Prepared, rig: tuple[Any, str], logs: dict[str, Any]
    ) -> list[tuple[costs.Cost, costs.Cost, costs.Cost]]:
        """What answering the held-out rows costs: base, base with examples and tuned model, test and dev rows."""
        from luthier.training import memory

        batch_size = prepared.spec.evaluate.batch_size
        asked = [one for dev in (False, True) for one in questions(prepared, dev=dev)]
        if not asked:
            return []
        worst = max(asked, key=lambda one: min(batch_size, one.rows) * (one.longest - one.shared + one.most))
        rows = min(batch_size, worst.rows)
        batch = memory.Asked(rows, worst.longest, worst.shared, worst.most)
        log = self._once((rig[1], batch), lambda: memory.rehearse_answer(rig[0], batch))
        logs["answer"] = log
        rehearsed = worst.shared + rows * (worst.longest - worst.shared)
        told = []
        for one in asked:
            prompts, least = costs.cost_of_answers(log, rehearsed, one, batch_size, one.least)
            told.append((prompts, least, costs.cost_of_answers(log, rehearsed, one, batch_size, one.most)[1]))
        return told

    def _converted(self, spec: RunSpec) -> int:
        """Bytes of the file that lie beside the weights while they are converted."""
        if self.shape:
            return 0
        packed = spec.quantize.name != "none"
        return costs.file_bytes(self.prepared.model_folder, "" if packed else FILE_DTYPES[str(self.dtype)[6:]])

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.shape:
            notes.append(
                f"{self.shape} is not here: tokens are counted with {self.prepared.spec.model.name}'s tokenizer"
            )
        if not self.here:
            notes.append(f"this machine has no {self.device}: its memory is computed, and its time is not known")
        elif self.device.startswith("cuda"):
            notes.append("the forecast of GPU memory is computed; it was measured on CPUs only")
        return tuple(notes)


def questions(prepared: Prepared, *, dev: bool) -> list[costs.Answers]:
    """What each system is asked about one side's rows."""
    examples = prepared.dev if dev else prepared.test
    if not examples:
        return []
    judge = Judge(
        examples=examples, shots_from=prepared.train, template=prepared.template, tokenizer=prepared.tokenizer,
        settings=prepared.spec.evaluate, folder=Path(), identity={}, context=prepared.context,
        rendered=prepared.rendered_dev if dev else prepared.rendered_test,
    )  # fmt: skip
    wanted = max(len(prepared.tokenizer.encode(example.answer)) + 1 for example in judge.examples)
    least = min(judge.max_new_tokens, wanted)
    plain = [judge.prompt(example) for example in judge.examples]
    systems = [("base", plain), ("tuned", plain)]
    if not dev and judge.fits():
        systems.append(("base_few_shot", [judge.prompt(example, True) for example in judge.examples]))
    return [_question(name, prompts, least, judge.max_new_tokens) for name, prompts in systems]


def _question(system: str, prompts: Sequence[Sequence[int]], least: int, most: int) -> costs.Answers:
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    lengths = [len(prompt) for prompt in prompts]
    shared = max(0, min(common, min(lengths) - 1))
    return costs.Answers(system, len(prompts), sum(lengths), max(lengths), shared, least, most)


def feed_of(prepared: Prepared, *, share: bool) -> ShuffledFeed:
    """The run's feed; for a stream, one over its first rows that is as long as the run."""
    if prepared.stream is None:
        feed = prepared.feed(share=share)
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
        share=share,
    )


def is_here(device: str) -> bool:
    """Whether this machine has the device."""
    import torch

    kind = device.partition(":")[0]
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(kind, True)


def free_memory(device: str) -> int:
    """Bytes that are free for training on a device now."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    import psutil

    return int(psutil.virtual_memory().available)


def print_planned(planned: Planned, console: Console) -> None:
    """Show it to a person: memory by part, time by stage, what fits."""
    from luthier.flows import fitting

    fitting.show(planned, console)
