"""The training loop: a generator of `Step`. Logging, reports and trackers are the caller's for-body.

    training = Training(adapted, objective, feed, settings, device=device, dev_packs=dev, checkpoints=checkpoints)
    for step in training:
        log(step)
    record(training.outcome)

A step's gradient is the sum over all its packs divided once by the summed count, so packs and processes change
nothing but rounding. After a kill at any moment a resumed run ends with the same bytes (reliability section 2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from luthier.contracts import Adapted, Method, Objective
from luthier.errors import CheckpointError, Diverged, Fault, TrainingError
from luthier.model.norms import quick_norms
from luthier.records import Loss, Pack, Step
from luthier.spec import TrainSpec
from luthier.training import peak, rng
from luthier.training.checkpoint import Checkpoints, Snapshot
from luthier.training.feed import Feed, StepBatch
from luthier.training.optim import Master, scale
from luthier.training.progress import Outcome, Progress
from luthier.training.ranks import Ranks, here
from luthier.training.shares import Cost
from luthier.training.signals import Stop, asked_to_stop

if TYPE_CHECKING:
    from luthier.model.frozen import Frozen

LossOf = Callable[[Pack], Loss]
RANDOM, ADAPTER = "random.", "adapter."
SHOWN_ROWS = 8
EVALUATION_SEED = 20_011


class Training:
    """One run of the loop, fresh or resumed. Iterate over it once; `outcome` is true at any time."""

    def __init__(
        self,
        adapted: Adapted,
        objective: Objective | None,
        feed: Feed,
        settings: TrainSpec,
        *,
        device: torch.device | str = "cpu",
        dev_packs: Sequence[Pack] | None = None,
        method: Method | None = None,
        checkpoints: Checkpoints | None = None,
        resume: bool = False,
        loss_of: LossOf | None = None,
        ranks: Ranks | None = None,
        lower: Frozen | None = None,
    ) -> None:
        """`method` brings its learning rate and parameter groups; `loss_of` replaces forward pass and objective.

        `lower` holds the states of frozen lower layers, which then do not run.
        """
        self.device = torch.device(device)
        self.ranks = ranks or here(self.device)
        self._cost = Cost.of(adapted.model)
        self.feed, self.settings = feed, settings
        self.progress = Progress()
        self.resumed_from: int | None = None
        self.stop = Stop()  # says whether someone asked for an end, be it in the last step
        self.notes: list[str] = []
        self._model, self._adapted = adapted.model, adapted
        self._peak_rate = settings.learning_rate or (method or Method).learning_rate
        trainable = adapted.trainable()
        self._master = Master(trainable, settings, method.groups(list(trainable)) if method else None)
        if settings.checkpointing:
            from luthier.model.attention import recompute_activations

            recompute_activations(self._model)
        self._dev_packs = dev_packs or ()
        self._checkpoints = checkpoints
        self._loss_of = loss_of or _loss_of(self._model, objective, self.device, lower)
        self._random: rng.RandomState | None = None  # where the generators stand between two steps
        self._best_values: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = (
            None  # only where there are no checkpoints to read it from
        )
        self._saved = self._restored = 0
        self._ended = "running"
        self._prepare(resume)

    def __iter__(self) -> Iterator[Step]:
        """Train, yielding each finished step before it is saved, so that a log never lacks a saved step."""
        with asked_to_stop() as stop, _mode(self._model, training=True), quick_norms(self._model):
            self.stop = stop
            self._begin()
            while not self._finished():
                step, best = self._advance()
                yield step
                rng.restore(self._standing, self.device)  # whatever the caller drew is its own affair
                stopping = self._agreed(stop) and not self._finished()
                if self._checkpoints and (
                    best or stopping or self._finished() or self._milestone(self.settings.save_every)
                ):
                    self._save(self._checkpoints)
                if stopping:
                    self._ended, self._restored = "interrupted", self.progress.step
                    return
            self._finish()

    @property
    def outcome(self) -> Outcome:
        """How the run stands or has ended."""
        told = self.progress
        return Outcome(
            ended=self._ended,
            steps=told.step,
            saved_step=self._saved,
            total_steps=self.feed.total_steps,
            resumed_from=self.resumed_from,
            restored_step=self._restored or told.step,
            best_step=told.best_step,
            best_dev_loss=told.best_dev_loss,
            evaluations=tuple(told.evaluations),
            overfit=told.overfit(),
            notes=tuple(self.notes),
            totals=replace(told.totals),
            trainable=len(self._master),
        )

    @property
    def _standing(self) -> rng.RandomState:
        assert self._random is not None, "the loop has begun"
        return self._random

    def _prepare(self, resume: bool) -> None:
        """Check the disk and go to where the newest good checkpoint stands."""
        if self._checkpoints is None:
            return
        if not resume:
            self._checkpoints.refuse_others()
        kept = (*self._master.state().values(), *self._adapted.state().values())
        size = sum(tensor.nbytes for tensor in kept)
        self._checkpoints.preflight(size)
        if not resume:
            return
        if not self.ranks.first:
            self.ranks.wait()  # the first process sets damaged ones aside, then all read the same one
        found = self._checkpoints.latest()
        if self.ranks.first:
            self.ranks.wait()
        self.notes += [f"set aside a damaged checkpoint: {fault}" for fault in found.damaged]
        if found.snapshot is None:
            self.notes.append("there was no checkpoint to go on from: started at the beginning")
        else:
            self._restore(found.snapshot)

    def _restore(self, snapshot: Snapshot) -> None:
        state = snapshot.state
        if state["layout"] != self._master.layout:
            raise CheckpointError("holds another adapter", where=str(snapshot.folder), remedy="start a new run")
        self._adapted.restore(_under(ADAPTER, snapshot.tensors))
        self._master.restore(snapshot.tensors)
        self.feed.restore(state["feed"])
        self.progress = Progress.from_json(state["progress"])
        self.resumed_from = self._saved = snapshot.step
        self.notes += snapshot.warnings
        random = _under(RANDOM, snapshot.tensors)
        if {len(of_all) for of_all in random.values()} == {self.ranks.count}:
            self._random = {name: of_all[self.ranks.index].clone() for name, of_all in random.items()}
        else:
            self.notes.append("resume is correct but not bit-exact: another number of processes")

    def _begin(self) -> None:
        if self._random is None:
            rng.seed_all(self.settings.seed, branch=self.ranks.index)  # processes drop out apart
        else:
            rng.restore(self._random, self.device)

    def _finished(self) -> bool:
        return self.progress.stopped_early or self.progress.step >= self.feed.total_steps

    def _advance(self) -> tuple[Step, bool]:
        """One optimiser step and, where it is due, a look at the dev rows; also whether it is the best so far."""
        begun = time.perf_counter()
        batch = next(self.feed, None)
        if batch is None:
            raise TrainingError(
                f"the feed ended before step {self.feed.total_steps}", remedy="this is a defect of the feed"
            )
        loss, count, norm, rate = self._optimise(batch)
        self.progress.step += 1
        seconds = time.perf_counter() - begun
        self._account(batch, loss * count, count, seconds)
        dev_loss, best = None, False
        if self._dev_packs and (
            self._milestone(self.settings.eval_every) or self.progress.step >= self.feed.total_steps
        ):
            dev_loss = self._evaluate()
            best = self.progress.look(batch.epoch, dev_loss, self.settings.patience)
            if best and self._checkpoints is None:
                self._best_values = (self._master.master.clone(), self._adapted.state())
        self._random = rng.capture(self.device)
        step = Step(
            index=self.progress.step, epoch=batch.epoch, loss=loss, learning_rate=rate, grad_norm=norm,
            tokens=sum(len(pack) for pack in batch.packs), plain_tokens=sum(pack.plain_tokens for pack in batch.packs),
            supervised=count, examples=batch.examples, seconds=seconds, memory=peak.of(self.device),
            dev_loss=dev_loss,
        )  # fmt: skip
        return step, best

    def _optimise(self, batch: StepBatch) -> tuple[float, float, float, float]:
        """Accumulate all packs and update once; return mean loss, count, gradient norm, learning rate."""
        packs = self.ranks.share(batch.packs, self._cost)
        sums, count = [], 0.0
        for pack in packs:
            loss = self._loss_of(pack)
            loss.sum.backward()
            self._master.collect()
            sums.append(loss.sum.detach())
            count += loss.count
        self._keep_pace(batch.packs)
        own = [float(value) for value in torch.stack(sums).tolist()] if sums else []  # one wait for the device
        total, count = self.ranks.sums(math.fsum(own) if all(map(math.isfinite, own)) else math.nan, count)
        if not math.isfinite(total) or not count:
            self._fail(
                "the loss is not a number" if count else "nothing is supervised", _bad(packs, own) or batch.packs
            )
        penalty = self._adapted.penalty()
        if penalty is not None:  # the same in every process: it must not be summed over them
            (penalty * (count / self.ranks.count)).backward()
            self._master.collect()
        self.ranks.sum_(self._master.grad)
        share = scale(
            self.progress.step, self.feed.total_steps, schedule=self.settings.schedule, warmup=self.settings.warmup
        )
        rate = self._peak_rate * share
        done, planned = self.progress.step + 1, self.feed.total_steps
        norm = self._master.step(count, rate, lambda gradients: self._adapted.stepped(done, planned, gradients))
        if not math.isfinite(norm):
            self._fail("the gradient is not a number", batch.packs)
        return total / count, count, norm, rate

    def _keep_pace(self, packs: Sequence[Pack]) -> None:
        """Where all processes put layers together at once, run a pack along for those that have more of them."""
        for _ in range(self.ranks.idle(packs)):
            loss = self._loss_of(min(packs, key=len)).sum
            if loss.requires_grad:
                loss.backward()
                self._master.drop()

    def _fail(self, what: str, packs: Sequence[Pack]) -> None:
        self._master.discard()
        faults = [Fault(f"rows {_listing(pack.rows)}", "were computed together") for pack in packs]
        remedy = "look at these rows; else lower train.learning_rate or use model.dtype=float32"
        kind = Diverged if what.endswith("not a number") else TrainingError
        raise kind(f"{what} in step {self.progress.step + 1}", faults=faults, remedy=remedy)

    def _account(self, batch: StepBatch, loss_sum: float, count: float, seconds: float) -> None:
        self.progress.loss_sum += loss_sum
        self.progress.loss_count += count
        totals = self.progress.totals
        totals.examples += batch.examples
        totals.tokens += sum(len(pack) for pack in batch.packs)
        totals.plain_tokens += sum(pack.plain_tokens for pack in batch.packs)
        totals.supervised += count
        totals.seconds += seconds

    def _milestone(self, every: int | None) -> bool:
        """Whether the step just done is one of every so many; by default each half epoch (a tenth of a stream)."""
        step = self.progress.step
        if every is not None:
            return step % every == 0
        halves, length = (2, self.feed.steps_per_epoch) if self.feed.steps_per_epoch else (10, self.feed.total_steps)
        return step * halves // length != (step - 1) * halves // length

    def _evaluate(self) -> float:
        """Mean loss over the dev rows, without dropout and without touching the training's randomness."""
        total = count = 0.0
        with rng.aside(EVALUATION_SEED, self.device), _mode(self._model, training=False), torch.no_grad():
            for pack in self.ranks.share(self._dev_packs, self._cost):
                loss = self._loss_of(pack)
                total += float(loss.sum)
                count += loss.count
            self._keep_pace(self._dev_packs)
        total, count = self.ranks.sums(total, count)
        if not count or not math.isfinite(total):
            self._fail("the dev loss is not a number", self._dev_packs)
        return total / count

    def _agreed(self, stop: Stop) -> bool:
        """Whether any process was asked to stop: all must leave after the same step."""
        return self.ranks.sums(float(bool(stop)))[0] > 0

    def _save(self, checkpoints: Checkpoints) -> None:
        tensors = self._master.state()
        tensors.update({ADAPTER + name: own for name, own in self._adapted.state().items()})
        for name, own in self._standing.items():
            tensors[RANDOM + name] = self.ranks.gather(own)
        state = {"layout": self._master.layout, "feed": self.feed.state(), "progress": self.progress.as_json()}
        if self.ranks.first:
            checkpoints.save(self.progress.step, tensors, state, pin=self.progress.best_step)
        self.ranks.wait()
        self._saved = self.progress.step

    def _finish(self) -> None:
        """Put the best dev loss's values back on the model."""
        self._ended = "early" if self.progress.stopped_early else "complete"
        best, self._restored = self.progress.best_step, self.progress.step
        if best is None or best == self.progress.step:
            return
        values = self._best_values
        if self._checkpoints is not None:
            try:
                found = self._checkpoints.read(best).tensors
                values = found["master"], _under(ADAPTER, found)
            except CheckpointError as error:
                self.notes.append(f"the best step's values are lost, the last step's are kept: {error}")
                return
        if values is not None:
            self._adapted.restore(values[1])
            self._master.set_values(values[0])
            self._restored = best


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _loss_of(model: Any, objective: Objective | None, device: torch.device, lower: Frozen | None) -> LossOf:
    from luthier.model.batch import Batch
    from luthier.model.logprob import logprobs

    if objective is None:
        raise TrainingError("training needs an objective, or a loss of its own")

    def loss_of(pack: Pack) -> Loss:
        batch = Batch.of(pack, device).entered(lower.entry(pack) if lower else None)
        return objective.loss(logprobs(model, batch), batch)

    return loss_of


@contextmanager
def _mode(model: Any, *, training: bool) -> Iterator[None]:
    """Switch dropout on or off and put every module back as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def _bad(packs: Sequence[Pack], losses: Sequence[float]) -> list[Pack]:
    return [pack for pack, loss in zip(packs, losses, strict=True) if not math.isfinite(loss)]


def _listing(rows: Sequence[str]) -> str:
    unique = list(dict.fromkeys(rows))
    more = f" and {len(unique) - SHOWN_ROWS} more" if len(unique) > SHOWN_ROWS else ""
    return ", ".join(unique[:SHOWN_ROWS]) + more
