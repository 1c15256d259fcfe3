"""A trial: one method at one learning rate from one seed over so many steps, kept below a key of all that decides it.

A `Bench` holds what trials share: rows rendered once, one base that every trial borrows and gives back unchanged, bit
for bit. A trial is told by (task, method, rate, seed, steps, folder) alone, so any process can run one.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import registry, store
from luthier.contracts import Adapted, Method
from luthier.errors import Diverged, Fault, SpecError, TrainingError
from luthier.flows import train as flow
from luthier.flows.events import Listener, Note, Progress, silent
from luthier.flows.lower import keep_lower
from luthier.flows.prepare import Prepared, prepare
from luthier.hub import cards
from luthier.records import AdapterCard, Pack, Rendered, Step
from luthier.spec import RunSpec

if TYPE_CHECKING:
    from luthier.model.frozen import Frozen

FORMAT = 1  # of a kept trial: raised when what a trial does changes
DEV_ROWS = 400  # rows that a dev loss is taken on, chosen once by content
SEARCH_LOOKS, SAVES = 2, 4  # dev losses of a search trial, checkpoints of any trial
WORTH_SAVING = 30.0  # seconds that a killed trial may lose: shorter ones keep no checkpoint
STOPPED, GO_ON = "stopped; what was saved is kept", "the same command goes on from here"
FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Trial:
    """What is run. `final`: of full length, looked at as often as the task says, its adapter is kept."""

    method: Mapping[str, Any]  # name and every option
    rate: float
    seed: int
    steps: int
    final: bool = False
    saves: bool = True  # whether it is long enough to be worth checkpoints; decides nothing else

    @property
    def words(self) -> str:
        return f"{self.method['name']} at {self.rate:.2g}, {self.steps} steps, seed {self.seed}"


class Bench:
    """Rows and base of a study, in this process."""

    def __init__(self, spec: RunSpec, prepared: Prepared, folder: Path, tell: Listener = silent) -> None:
        from luthier.model import quantize

        self.spec, self.prepared, self.folder = spec, prepared, folder
        self.base, self.identity = flow.load_base(spec, prepared, tell)
        self.share: bool = not prepared.separate and spec.train.share_prefixes
        self.weights: int = quantize.parameters(self.base)
        self.full: int = prepared.feed(share=False).total_steps
        self._bits = bits(self.base)
        self._stop = False
        self._lower: Frozen | None = None  # states that serve every trial whose lowest learning layer is the same

    @classmethod
    def open(cls, spec: RunSpec, folder: Path, tell: Listener = silent) -> Bench:
        """Prepare the rows and load the base; SpecError for a stream, which every trial would have to read anew."""
        if spec.data.stream:
            raise SpecError("cannot be studied", where="data.stream", remedy="set data.stream=false, on a sample")
        sides = folder / "split.json"
        history = dict(store.read_json(sides)["sides"]) if sides.exists() else None
        prepared = prepare(spec, split_history=history, on_event=tell)
        if not prepared.dev:
            raise SpecError("is empty", where="data.dev", remedy="a search needs dev rows: a file, or a share of 0.15")
        if history is None:
            store.write_json(sides, prepared.split.as_dict())
        return cls(spec, prepared, folder, tell)

    @cached_property
    def dev(self) -> list[Rendered]:
        """The dev rows that losses are taken on."""
        return sorted(self.prepared.rendered_dev, key=lambda row: row.example_id)[:DEV_ROWS]

    @cached_property
    def dev_packs(self) -> list[Pack]:
        from luthier.text import pack

        return pack.plan(self.dev, budget=self.spec.train.tokens_per_pack, share=self.share)

    @property
    def looks_every(self) -> int:
        """Steps between the dev losses of a full-length run: as the task says, else half an epoch."""
        epoch = self.prepared.feed(share=False).steps_per_epoch or self.full
        return self.spec.train.eval_every or max(1, epoch // 2)

    def asked(self, trial: Trial) -> RunSpec:
        """The task as this trial runs it."""
        search = {"eval_every": math.ceil(trial.steps / SEARCH_LOOKS), "patience": None}
        final = {"eval_every": min(self.looks_every, trial.steps), "patience": self.spec.train.patience}
        settings = self.spec.train.model_copy(
            update={
                "learning_rate": trial.rate, "seed": trial.seed, "max_steps": trial.steps,
                "save_every": math.ceil(trial.steps / SAVES), "report_to": [], **(final if trial.final else search),
            }
        )  # fmt: skip
        return self.spec.model_copy(update={"method": dict(trial.method), "train": settings})

    def key(self, trial: Trial) -> str:
        """A hash of everything that decides a trial's result."""
        return store.content_hash([FORMAT, self._fingerprint(trial)["task"], self._told])

    def kept(self, trial: Trial) -> dict[str, Any] | None:
        """The result of a finished trial; None where it must still be run."""
        path = self.folder / "trials" / f"{self.key(trial)}.json"
        if not path.exists():
            return None
        result: dict[str, Any] = store.read_json(path)
        lost = trial.final and result["status"] == "complete" and store.verify_folder(self.adapter(result))
        return None if lost else result

    def adapter(self, result: Mapping[str, Any]) -> Path:
        """Where the adapter of a full-length trial lies."""
        return self.folder / "trials" / str(result["key"]) / "adapter"

    def run(self, trial: Trial, tell: Listener = silent) -> dict[str, Any]:
        """Run a trial, or go on with one that was killed, or read what it came to; a divergence is a result too."""
        kept = self.kept(trial)
        if kept is not None:
            return kept
        key, began = self.key(trial), time.perf_counter()
        place = self.folder / "trials" / key
        result: dict[str, Any] = {"key": key, "trial": dataclasses.asdict(trial)}
        with self.attached(trial) as (adapted, method, prepared):
            try:
                result |= self._learn(trial, adapted, method, prepared, place / "checkpoints", tell)
            except Diverged as error:
                result |= {"status": "diverged", "dev_loss": None, "why": error.what}
            if trial.final and result["status"] == "complete":
                result |= self._publish(trial, adapted, place / "adapter", result)
        result["seconds"] = time.perf_counter() - began
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        store.write_json(place.with_suffix(".json"), result)
        if self._stop:  # asked for in the last step: the trial is kept, what would follow waits
            raise TrainingError(STOPPED, remedy=GO_ON)
        return result

    @contextmanager
    def attached(self, trial: Trial) -> Iterator[tuple[Adapted, Method, Prepared]]:
        """A fresh adapter on the base, taken off at the end; TrainingError where the base is not what it was."""
        method: Method = registry.make("methods", trial.method, "method")
        prepared = dataclasses.replace(self.prepared, spec=self.asked(trial))
        adapted = method.attach(self.base, seed=trial.seed, evidence=flow.RunEvidence(self.base, prepared))
        try:
            yield adapted, method, prepared
        finally:
            self._take_back(adapted, method.name)

    @contextmanager
    def loaded(self, result: Mapping[str, Any]) -> Iterator[Adapted]:
        """A finished trial's adapter on the base, ready to answer, taken off at the end."""
        method: Method = registry.make("methods", result["trial"]["method"], "method")
        adapted = method.load(self.base, self.adapter(result))
        adapted.model.eval()
        try:
            yield adapted
        finally:
            self._take_back(adapted, method.name)

    def _take_back(self, adapted: Adapted, name: str) -> None:
        self.base = adapted.detach().eval()
        if bits(self.base) != self._bits:
            raise TrainingError(f"the method '{name}' left the base changed", remedy="this is a defect of the method")

    def _learn(
        self, trial: Trial, adapted: Adapted, method: Method, prepared: Prepared, folder: Path, tell: Listener
    ) -> dict[str, Any]:
        from luthier.training.checkpoint import Checkpoints
        from luthier.training.loop import Training

        checkpoints = Checkpoints(folder, keep=2, fingerprint=self._fingerprint(trial)) if trial.saves else None
        self._lower = keep_lower(
            adapted.model, prepared, self.dev_packs, share=self.share, known=self._lower, again=True, tell=tell
        )
        training = Training(
            adapted, prepared.objective, prepared.feed(share=self.share), prepared.spec.train,
            device=adapted.model.device, dev_packs=self.dev_packs, method=method, checkpoints=checkpoints,
            resume=bool(checkpoints and checkpoints.steps()), lower=self._lower,
        )  # fmt: skip
        for note in training.notes:
            tell(Note(note, "warning"))
        steps: list[Step] = []
        for step in training:
            steps.append(step)
            usual = statistics.median(one.seconds for one in steps)
            tell(Progress(step, trial.steps, usual * (trial.steps - step.index)))
        outcome, self._stop = training.outcome, bool(training.stop)
        if outcome.ended == "interrupted":
            raise TrainingError(STOPPED, remedy=GO_ON)
        return {
            "status": "complete",
            "dev_loss": outcome.best_dev_loss,
            "best_step": outcome.best_step,
            "steps": outcome.steps,
            "resumed_from": outcome.resumed_from,
            "looks": [[look.step, look.dev_loss] for look in outcome.evaluations],
            "trainable": outcome.trainable,
            "step_seconds": statistics.median(step.seconds for step in steps[1:] or steps),
            "training_seconds": outcome.totals.seconds,
        }

    def _publish(self, trial: Trial, adapted: Adapted, folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
        prepared, spec = self.prepared, self.asked(trial)
        outcome = {"best_dev_loss": result["dev_loss"], "restored_step": result["best_step"]}
        card: AdapterCard = flow.card_of(spec, prepared, self.identity, outcome)
        text = cards.readme(card, f"One run of a study of methods: {trial.words}.")
        card = cards.publish(
            folder, adapted, card, template=prepared.template, tokenizer=prepared.tokenizer, readme=text
        )
        size = sum((folder / name).stat().st_size for name in FILES)
        return {"digest": card.files[FILES[0]], "adapter_bytes": size}

    @property
    def _told(self) -> dict[str, Any]:
        """What decides a trial beside its task: how texts become ids, in which format the base computes."""
        rows = [row.example_id for row in self.dev]
        return {"template": self.identity["template"], "dtype": self.identity["dtype"], "dev": store.content_hash(rows)}

    def _fingerprint(self, trial: Trial) -> dict[str, Any]:
        from luthier.training.checkpoint import fingerprint

        return fingerprint(
            self.asked(trial), data_hash=self.prepared.data_hash, base_hash=self.identity["base"],
            device=self.identity["device"], dtype=self.identity["dtype"],
        )  # fmt: skip


def bits(model: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and sum of the raw words of every tensor of a model: cheap, and changed by any change of a value."""
    import torch

    seen: dict[int, int] = {}

    def told(tensor: Any) -> int:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        return int((raw.view(torch.int64) if raw.numel() % 8 == 0 else raw).sum(dtype=torch.int64))

    def once(tensor: Any) -> int:
        place = tensor.data_ptr()
        return seen[place] if place in seen else seen.setdefault(place, told(tensor))  # tied weights

    return {name: (tuple(tensor.shape), once(tensor)) for name, tensor in model.state_dict().items()}


def resolve(spec: RunSpec, methods: Sequence[str | Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The asked methods with all their options, each under a label; SpecError with every fault.

    A bare name that is the task's own method stands for it with the task's options. A label is the name, with the
    options that were written where another method has the same.
    """
    own, labelled = spec.method["name"], dict[str, dict[str, Any]]()
    written = [one if isinstance(one, str) else dict(one) for one in methods]
    asked = [{"name": one} if isinstance(one, str) else one for one in written]
    names = [one.get("name") for one in asked]
    full = [dict(spec.method) if one == own else {"name": one} if isinstance(one, str) else one for one in written]
    faults = [fault for one in full for fault in registry.check("methods", one, "methods")]
    if not methods:
        faults = [Fault("methods", "is empty", f"name some of: {', '.join(registry.names('methods'))}")]
    if faults:
        raise SpecError("methods that cannot be studied", faults=faults)
    for short, one in zip(asked, full, strict=True):
        label = one["name"] if names.count(one["name"]) == 1 else _with_options(short)
        plugin = registry.make("methods", one, "methods")
        labelled[label] = {"name": one["name"], **plugin.options.model_dump(mode="json")}
    return labelled


def _with_options(method: Mapping[str, Any]) -> str:
    return " ".join([method["name"], *(f"{key}={value}" for key, value in method.items() if key != "name")])
