"""The whole job on the real 135M model: killed and resumed it ends with the same bytes, and it learns."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import luthier
from luthier import store

pytestmark = pytest.mark.slow
DEMO = Path(__file__).resolve().parents[1] / "demo"
KILLS = 3


def write_task(folder: Path) -> Path:
    """A few rows of the demo task, six short steps, a checkpoint after each."""
    folder.mkdir()
    for name, count in (("train", 24), ("test", 4)):
        lines = (DEMO / f"{name}.jsonl").read_text("utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "task.yaml").write_text(
        "model: smollm2-135m\n"
        "data: {train: train.jsonl, dev: 0.15, test: test.jsonl}\n"
        "method: {name: lora, rank: 4, dropout: 0.05}\n"
        "train: {batch_size: 4, max_steps: 6, eval_every: 3, save_every: 1, learning_rate: 2.0e-3}\n"
        "evaluate: {primary: json_fields, few_shot: 0, max_new_tokens: 6}\n"
        f"runs: {folder / 'runs'}\n",
        "utf-8",
    )
    return folder / "task.yaml"


def start(task: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "luthier", "train", str(task), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def digest(folder: Path) -> str:
    return store.sha256_file(folder / "runs" / "task" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "whole"
    done = start(write_task(folder))
    _, errors = done.communicate()
    assert done.returncode == 0, errors.decode()
    return folder


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment_it_ends_with_the_same_bytes(whole, tmp_path, number):
    rng = random.Random(number)
    folder = tmp_path / "cut"
    running = start(write_task(folder))
    log, wanted = folder / "runs" / "task" / "steps.jsonl", rng.randrange(1, 6)
    while running.poll() is None and (not log.exists() or len(log.read_text("utf-8").splitlines()) < wanted):
        time.sleep(0.02)
    time.sleep(rng.random())
    assert running.poll() is None, "it was killed while it ran"
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    again = start(folder / "task.yaml", "--resume")
    _, errors = again.communicate()
    assert again.returncode == 0, errors.decode()
    assert digest(folder) == digest(whole)


def test_plain_peft_gives_identical_logits(whole):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from luthier.model import catalog

    tuned = luthier.load(whole / "runs" / "task")
    folder = catalog.locate("smollm2-135m")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, tuned.card.dtype))
    plain = PeftModel.from_pretrained(base, tuned.run.adapter, autocast_adapter_dtype=False).eval()
    ids = torch.tensor([list(tuned.prompt("my kettle leaks, can I come on friday at 3?"))])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, tuned.model(input_ids=ids).logits)


def test_trees_are_exact_on_the_real_model(whole):
    """Loss and gradient of demo rows in one prefix tree equal those of separate rows, in float32."""
    from luthier import registry
    from luthier.data.read import read
    from luthier.model import catalog, load
    from luthier.model.batch import Batch
    from luthier.model.logprob import logprobs
    from luthier.text import pack
    from luthier.text.render import render_all
    from luthier.text.tokenizer import Tokenizer

    folder = catalog.locate("smollm2-135m")
    tokenizer, template = Tokenizer.from_folder(folder), registry.make("templates", "chat")
    rows = render_all(read([DEMO / "train.jsonl"]).examples[:6], template, tokenizer).rendered
    adapted = registry.make("methods", {"name": "lora", "rank": 4}).attach(
        load.load_model(folder, dtype="float32"), seed=0
    )
    parameters = list(adapted.trainable().values())
    torch.manual_seed(0)
    for p in parameters:
        p.data += 0.01 * torch.randn_like(p)
    found = []
    for share in (True, False):
        loss = torch.zeros(())
        for one in pack.plan(rows, budget=4096, share=share):
            batch = Batch.of(one)
            loss = loss - (logprobs(adapted.model, batch) * batch.target_weights).sum()
        found.append((loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])))
    (shared, shared_gradient), (apart, gradient) = found
    assert abs(float(shared - apart)) <= 1e-5 * abs(float(apart))
    assert float((shared_gradient - gradient).norm()) <= 1e-5 * float(gradient.norm())


def test_the_demo_task_runs_as_shipped_for_two_steps(tmp_path):
    report = luthier.train(
        DEMO / "task.yaml",
        [
            "train.max_steps=2",
            "evaluate.limit=4",
            "evaluate.few_shot=1",
            "evaluate.max_new_tokens=8",
            f"runs={tmp_path}",
        ],
    )
    assert report["primary"]["n"] == 4
    assert report["sharing"]["ratio"] > 3, "the instruction is more than 70 % of a row"
