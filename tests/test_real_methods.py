"""Every method on the shelf takes twenty real steps on SmolLM2-135M, and leaves the base as it found it."""

from __future__ import annotations

import pytest
import torch

from luthier import registry
from luthier.flows import methods as table
from luthier.records import Example, Message, Origin
from luthier.spec import TrainSpec
from luthier.text import pack
from luthier.text.render import render
from luthier.text.tokenizer import Tokenizer
from luthier.training.feed import ShuffledFeed
from luthier.training.loop import Training

pytestmark = pytest.mark.slow
STEPS = 20
NAMES = [name for name in registry.names("methods") if not table.needs_options(name)]
TASK = "Name the drawer."
# Some build a whole matrix per layer and step: slow on all layers, so they have a few of them here.
SQUARE, WHOLE = ("hra", "boft"), ("fourierft", "waveft", "loha", "hira", "randlora", "lokr")
OPTIONS = {
    **{name: {"target_modules": ["v_proj"]} for name in SQUARE},
    **{name: {"target_modules": ["q_proj", "v_proj"]} for name in WHOLE},
}
ROWS = [
    ("A screw of four millimetres.", "drawer 12"), ("Two hinges, brass.", "drawer 7"), ("A coil of wire.", "drawer 31"),
    ("Wood glue.", "drawer 4"), ("A hinge of steel.", "drawer 7"), ("Screws, six millimetres.", "drawer 12"),
    ("Copper wire.", "drawer 31"), ("Glue for paper.", "drawer 4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base():
    from luthier.model import catalog, load

    return load.load_model(catalog.locate("smollm2-135m"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def rendered():
    from luthier.model import catalog

    tokenizer = Tokenizer.from_folder(catalog.locate("smollm2-135m"))
    template = registry.make("templates", "chat")
    examples = [
        Example(
            (Message("system", TASK), Message("user", question), Message("assistant", answer)), Origin("rows", line)
        )
        for line, (question, answer) in enumerate(ROWS, 1)
    ]
    return [render(example, template, tokenizer) for example in examples]


class Evidence:
    total_steps = STEPS

    def __init__(self, model, rows) -> None:
        self.model, self.rows = model, rows

    def losses(self, count):
        from luthier.model.batch import Batch
        from luthier.model.logprob import logprobs

        for row in self.rows[:count]:
            (one,) = pack.plan([row], budget=4096)
            batch = Batch.of(one, "cpu")
            yield registry.make("objectives", "sft").loss(logprobs(self.model, batch), batch)


def test_the_shelf_is_long_enough():
    assert len(NAMES) >= 25


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_lower_the_loss(name, base, rendered):
    before = {key: tensor.clone() for key, tensor in list(base.state_dict().items())[::20]}
    method = registry.make("methods", {"name": name, **OPTIONS.get(name, {})})
    adapted = method.attach(base, seed=0, evidence=Evidence(base, rendered))
    settings = TrainSpec(batch_size=2, max_steps=STEPS, schedule="constant", warmup=0.0)
    feed = ShuffledFeed(
        [[row] for row in rendered], batch_size=2, seed=0, epochs=99, max_steps=STEPS, budget=4096, share=True
    )
    training = Training(adapted, registry.make("objectives", "sft"), feed, settings, method=method)
    losses = [step.loss for step in training]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    after = adapted.detach().state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
