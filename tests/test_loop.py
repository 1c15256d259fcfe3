"""The loop's laws: exact accumulation, honest evaluation, the best really restored, plain errors, signals."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
import toy
from toy import Toy

from luthier import registry
from luthier.contracts import Method
from luthier.errors import TrainingError
from luthier.records import Loss
from luthier.text import pack
from luthier.training.checkpoint import Checkpoints
from luthier.training.feed import ShuffledFeed
from luthier.training.loop import Training
from luthier.training.optim import scale


def values(subject: Toy) -> torch.Tensor:
    return torch.cat([p.detach().float().reshape(-1) for p in subject.trainable().values()])


def dev(count: int = 8) -> list:
    return pack.plan(toy.rows(count, seed=9), budget=64)


@pytest.mark.parametrize(("budget", "share"), [(1, True), (16, True), (10_000, False)])
def test_a_step_is_the_same_however_it_is_cut_into_packs(budget: int, share: bool) -> None:
    """(8 packs of 1) = (1 pack of 8): the sum over the step, divided once."""
    asked = toy.settings(batch_size=8)

    def run(budget: int, share: bool) -> tuple[torch.Tensor, list[float], int]:
        subject = Toy(dropout=0.0)
        source = ShuffledFeed(toy.rows(16), batch_size=8, seed=1, epochs=3, budget=budget, share=share)
        steps = list(toy.training(subject, asked, feed=source))
        return values(subject), [step.loss for step in steps], len(source.batch(0).packs)

    whole, losses, one = run(10_000, True)
    cut, cut_losses, many = run(budget, share)
    assert one == 1 and (many > 1 or not share)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)
    assert cut_losses == pytest.approx(losses, rel=1e-6)


def test_loss_and_gradient_are_means_over_supervised_weight() -> None:
    asked = toy.settings(batch_size=20, max_steps=1, clip=1e9)
    subject, reference = Toy(dropout=0.0), Toy(dropout=0.0)
    (step,) = toy.training(subject, asked)
    parts = [reference.loss(one) for one in pack.plan(toy.rows(), budget=1, share=False)]
    mean = sum(part.sum for part in parts) / sum(part.count for part in parts)
    mean.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.trainable().values()))
    assert step.loss == pytest.approx(float(mean.detach()), rel=1e-6)
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)
    assert step.supervised == pytest.approx(20 * 2.5)
    assert step.examples == 20 and step.tokens < step.plain_tokens == sum(len(row.ids) for row in toy.rows())


def test_it_learns_and_tells() -> None:
    asked = toy.settings(epochs=30, learning_rate=0.05)
    training = toy.training(Toy(dropout=0.0), asked)
    steps = list(training)
    assert steps[-1].loss < 0.9 * steps[0].loss
    assert [step.index for step in steps] == list(range(1, 121))
    assert steps[-1].epoch == pytest.approx(30)
    assert all(step.seconds > 0 and step.memory > 0 for step in steps)
    outcome = training.outcome
    assert (outcome.ended, outcome.steps, outcome.restored_step, outcome.trainable) == ("complete", 120, 120, 85)
    assert outcome.totals.examples == 600 and outcome.totals.tokens == sum(step.tokens for step in steps)


def test_the_learning_rate_follows_the_schedule_and_the_method_names_the_peak() -> None:
    class Quick(Method):
        learning_rate = 7e-3

        def attach(self, model, *, seed):
            raise NotImplementedError

        def groups(self, names):
            return {"down.bias": {"lr_scale": 0.0}}

    subject = Toy()
    before = subject.model.down.bias.clone()
    asked = toy.settings(learning_rate=None)
    rates = [step.learning_rate for step in toy.training(subject, asked, method=Quick())]
    expected = [7e-3 * scale(i, 12, schedule="cosine", warmup=asked.warmup) for i in range(12)]
    assert rates == pytest.approx(expected)
    assert torch.equal(subject.model.down.bias, before)


def test_evaluation_runs_without_dropout_and_leaves_no_trace() -> None:
    asked = toy.settings(eval_every=2, patience=None)
    plain = [step.loss for step in toy.training(Toy(), asked)]
    subject = Toy()
    looked = []
    for step in toy.training(subject, asked, dev_packs=dev()):
        looked.append(step.loss)
        if step.dev_loss is not None:
            calm = copy.deepcopy(subject.model).eval()
            twin = Toy()
            twin.model = calm
            parts = [twin.loss(one) for one in dev()]
            assert step.dev_loss == pytest.approx(
                float(sum(p.sum.detach() for p in parts)) / sum(p.count for p in parts)
            )
    assert looked == plain
    assert not subject.model.training


def test_what_the_caller_draws_is_its_own_affair() -> None:
    quiet, noisy = Toy(), Toy()
    list(toy.training(quiet, toy.settings()))
    for _ in toy.training(noisy, toy.settings()):
        torch.rand(7), random.random(), np.random.rand()
    assert quiet.digest() == noisy.digest()


def test_the_seed_decides_everything() -> None:
    def end(seed: int) -> str:
        torch.rand(3)  # wherever the generators stood
        subject = Toy()
        list(toy.training(subject, toy.settings(seed=seed)))
        return subject.digest()

    assert end(1) == end(1) != end(2)


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_best_dev_loss_is_what_the_model_ends_with(tmp_path: Path, on_disk: bool) -> None:
    """The dev rows have nothing to do with the training rows, so the dev loss soon rises."""
    subject = Toy(dropout=0.0)
    checkpoints = Checkpoints(tmp_path) if on_disk else None
    asked = toy.settings(epochs=25, patience=None, eval_every=3, learning_rate=0.05)
    training = toy.training(subject, asked, dev_packs=dev(), checkpoints=checkpoints)
    at_best, best = None, math.inf
    for step in training:
        if step.dev_loss is not None and step.dev_loss < best:
            best, at_best = step.dev_loss, subject.digest()
    outcome = training.outcome
    assert outcome.best_step is not None and outcome.best_step < outcome.steps == 100
    assert outcome.restored_step == outcome.best_step and outcome.best_dev_loss == best
    assert subject.digest() == at_best
    assert "over-fitting" in outcome.overfit and f"from step {outcome.best_step} to 100" in outcome.overfit


def test_a_lost_best_checkpoint_is_said(tmp_path: Path) -> None:
    subject = Toy(dropout=0.0)
    checkpoints = Checkpoints(tmp_path)
    asked = toy.settings(epochs=25, patience=None, eval_every=3, learning_rate=0.05)
    training = toy.training(subject, asked, dev_packs=dev(), checkpoints=checkpoints)
    for step in training:
        if step.index == 90:
            (checkpoints.path(training.outcome.best_step) / "tensors.safetensors").write_bytes(b"")
    assert training.outcome.restored_step == 100
    assert any("values are lost" in note for note in training.outcome.notes)


def test_early_stop_counts_dev_losses_without_gain() -> None:
    asked = toy.settings(epochs=25, patience=3, eval_every=2, learning_rate=0.05)
    training = toy.training(Toy(dropout=0.0), asked, dev_packs=dev())
    steps = list(training)
    outcome = training.outcome
    assert outcome.ended == "early" and len(steps) < 100
    assert steps[-1].index == outcome.best_step + 3 * 2


def test_a_run_too_short_to_evaluate_evaluates_at_its_end() -> None:
    (step,) = toy.training(Toy(), toy.settings(max_steps=1, eval_every=50), dev_packs=dev())
    assert step.dev_loss is not None


def test_by_default_the_dev_loss_is_taken_twice_an_epoch() -> None:
    steps = list(toy.training(Toy(), toy.settings(patience=None), dev_packs=dev()))
    assert [step.index for step in steps if step.dev_loss is not None] == [2, 4, 6, 8, 10, 12]


def test_a_loss_that_is_not_a_number_names_step_and_rows() -> None:
    subject = Toy()

    def broken(one):
        loss = subject.loss(one)
        return Loss(loss.sum * (math.nan if "row7" in one.rows else 1.0), loss.count)

    asked = toy.settings(epochs=1)
    source = ShuffledFeed(toy.rows(), batch_size=5, seed=3, epochs=1, budget=1)
    at = next(i for i in range(4) for one in source.batch(i).packs if "row7" in one.rows)
    with pytest.raises(TrainingError, match=rf"not a number in step {at + 1}\b") as told:
        list(toy.training(subject, asked, feed=source, loss_of=broken))
    assert len(told.value.faults) == 1 and "row7" in str(told.value)
    assert torch.isfinite(values(subject)).all()


def test_a_gradient_that_is_not_a_number_is_refused_before_it_does_harm() -> None:
    subject = Toy()
    before = subject.digest()

    def broken(one):
        loss = subject.loss(one)
        return Loss(loss.sum + torch.sqrt(subject.model.down.weight * 0).sum() * 0, loss.count)

    with pytest.raises(TrainingError, match="the gradient is not a number in step 1"):
        list(toy.training(subject, toy.settings(), loss_of=broken))
    assert subject.digest() == before


def test_nothing_supervised_is_an_error() -> None:
    unsupervised = [dataclasses.replace(row, weights=(0.0,) * len(row.ids)) for row in toy.rows()]
    with pytest.raises(TrainingError, match="supervised"):
        toy.feed(toy.settings(), unsupervised)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    training = toy.training(Toy(), toy.settings(), checkpoints=Checkpoints(tmp_path))
    for step in training:
        if step.index == 5:
            os.kill(os.getpid(), number)
    outcome = training.outcome
    assert (outcome.ended, outcome.steps, outcome.saved_step) == ("interrupted", 5, 5)
    assert "finishing this step" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_second_signal_aborts() -> None:
    done = 0
    with pytest.raises(KeyboardInterrupt):
        for _ in toy.training(Toy(), toy.settings()):
            done += 1
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert done == 1


def test_breaking_off_gives_signals_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    run = iter(toy.training(Toy(), toy.settings()))
    next(run)
    assert signal.getsignal(signal.SIGINT) is not before
    run.close()  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is before


def adapted_run(**changes) -> tuple[dict[str, torch.Tensor], list[float], int]:
    """Train a LoRA through the real forward pass; return its values, losses and how often the first layer ran."""
    lora = registry.make("methods", {"name": "lora", "rank": 4, "dropout": 0.2})
    net, passes = networks.network("llama"), []
    net.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    adapted = lora.attach(net, seed=1)
    asked = toy.settings(max_steps=4, **changes)
    steps = list(Training(adapted, registry.make("objectives", "sft"), toy.feed(asked), asked, method=lora))
    values = {name: p.detach().clone() for name, p in adapted.trainable().items()}
    return values, [step.loss for step in steps], len(passes)


def test_checkpointing_changes_memory_and_not_the_result() -> None:
    """Dropout included: a recomputed layer drops what it dropped before."""
    kept, losses, once = adapted_run()
    recomputed, again, twice = adapted_run(checkpointing=True)
    assert twice == 2 * once
    assert again == pytest.approx(losses, rel=1e-6)
    for name, value in kept.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-5, atol=1e-6)


TWO_RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import toy, torch
from luthier.text import pack
from luthier.training.checkpoint import Checkpoints
from luthier.training.feed import ShuffledFeed
from luthier.training.loop import Training
torch.set_num_threads(1)
subject = toy.Toy(dropout=float(sys.argv[3]))
asked = toy.settings(eval_every=3)
source = ShuffledFeed(toy.rows(), batch_size=5, seed=3, epochs=3, budget=8)
dev = pack.plan(toy.rows(8, seed=9), budget=8)
resume = sys.argv[4] == "resume"
stop = int(sys.argv[4]) if not resume else 99
training = toy.training(subject, asked, feed=source, dev_packs=dev, checkpoints=Checkpoints(Path(sys.argv[2])), resume=resume)
for step in training:
    if step.index == stop:
        break
if training.ranks.index == training.ranks.count - 1:
    print("END", training.ranks.count, subject.digest(), training.outcome.best_dev_loss, float(subject.model.down.weight.sum()))
"""


def launch(ranks: int, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=180, env=environment)
    assert told.returncode == 0, told.stderr
    return next(line for line in told.stdout.splitlines() if line.startswith("END")).split()[1:]


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_resume_exactly(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    here = str(Path(__file__).parent)
    one = launch(1, str(script), here, str(tmp_path / "a"), "0.0", "99")
    two = launch(2, str(script), here, str(tmp_path / "b"), "0.0", "99")
    assert (one[0], two[0]) == ("1", "2")
    assert float(two[2]) == pytest.approx(float(one[2]), rel=1e-5)
    assert float(two[3]) == pytest.approx(float(one[3]), rel=1e-4)
    whole = launch(2, str(script), here, str(tmp_path / "c"), "0.4", "99")
    launch(2, str(script), here, str(tmp_path / "d"), "0.4", "8")
    resumed = launch(2, str(script), here, str(tmp_path / "d"), "0.4", "resume")
    assert resumed == whole
