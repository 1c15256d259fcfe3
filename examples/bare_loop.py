"""The training path as one flat script: every act that `luthier train` does, in order, with nothing around it.

    python examples/bare_loop.py [rows.jsonl] [model]

Reads conversations, splits them, renders them, packs them as prefix trees, tunes a LoRA, and asks the tuned model. What
the real flow adds is care: checks, checkpoints, progress, dev loss, paired statistics, a report (flows/train.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from luthier import registry
from luthier.data.read import read
from luthier.data.split import split
from luthier.model import catalog, load
from luthier.model.batch import Batch
from luthier.model.generate import generate
from luthier.model.logprob import logprobs
from luthier.spec import TrainSpec
from luthier.text import pack
from luthier.text.render import render_all, render_prompt
from luthier.text.tokenizer import Tokenizer
from luthier.training.optim import Master, scale

EPOCHS, BATCH, RATE, BUDGET = 3, 8, 1e-2, 4096


def main(rows: str, model: str = "tiny") -> dict[str, float]:
    """Tune `model` on `rows`; return the first and last loss and the share of held-out answers that are right."""
    # read and split: rows that resemble each other stay on one side
    parts = split(read([rows]).examples, dev=0.0, test=0.2, seed=0)

    # render: messages become ids and weights, born together
    folder = catalog.locate(model)
    tokenizer, template = Tokenizer.from_folder(folder), registry.make("templates", "chat")
    rendered = render_all(parts.train, template, tokenizer).rendered

    # a frozen base with a fresh adapter on it
    base = load.load_model(folder, dtype="float32")
    adapted = registry.make("methods", {"name": "lora", "rank": 8}).attach(base, seed=0)
    master = Master(adapted.trainable(), TrainSpec())

    # the loop: one optimiser step is a batch of examples, laid out as prefix trees
    steps = EPOCHS * -(-len(rendered) // BATCH)
    losses: list[float] = []
    adapted.model.train()
    for epoch in range(EPOCHS):
        order = np.random.default_rng([0, epoch]).permutation(len(rendered))
        for first in range(0, len(order), BATCH):
            total = count = 0.0
            for one in pack.plan([rendered[i] for i in order[first : first + BATCH]], budget=BUDGET):
                batch = Batch.of(one)
                loss = -(logprobs(adapted.model, batch) * batch.target_weights).sum()
                loss.backward()
                master.collect()
                total, count = total + float(loss.detach()), count + float(batch.target_weights.sum())
            master.step(count, RATE * scale(len(losses), steps, schedule="cosine", warmup=0.05))
            losses.append(total / count)

    # ask the tuned model: the prompt is a prefix of what it was trained on
    adapted.model.eval()
    prompts = [render_prompt(example.prompt, example.tools, template, tokenizer) for example in parts.test]
    answers = generate(adapted.model, prompts, decode=tokenizer.decode, stop_ids=tokenizer.stop_ids, max_new_tokens=32)
    right = [answer.text.strip() == example.answer for answer, example in zip(answers, parts.test, strict=True)]
    found = {"first_loss": losses[0], "last_loss": losses[-1], "exact": sum(right) / max(1, len(right))}
    print(json.dumps(found))
    return found


def sample_rows(folder: Path) -> str:
    """Write two hundred rows of a task small enough for the tiny model, and return the file's path."""
    words = ("cup", "door", "shoe", "lamp", "chair", "bag", "hat", "box")
    generator = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(200):
            word = words[int(generator.integers(len(words)))]
            turns = [
                {
                    "role": "user",
                    "content": f"{generator.integers(10_000)} {word} {generator.integers(10_000)}: which?",
                },
                {"role": "assistant", "content": word},
            ]
            file.write(json.dumps({"id": number, "messages": turns}) + "\n")
    return str(folder / "rows.jsonl")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        given = sys.argv[1:] or [sample_rows(Path(temporary))]
        main(*given)
