"""Folding adapters in for many answers: the same answers, and afterwards the same bits."""

from __future__ import annotations

import laws
import pytest
import torch
from networks import VOCABULARY, network
from peft.tuners.tuners_utils import BaseTunerLayer

from luthier import registry
from luthier.adapt import folded as folding
from luthier.adapt.folded import folded
from luthier.flows.judge import Judge
from luthier.model import catalog, load
from luthier.model.generate import generate
from luthier.records import Completion, Example, Message, Origin
from luthier.spec import EvaluateSpec
from luthier.text.tokenizer import Tokenizer

FOLDED = ("lora", "dora", "ia3", "pissa", "adalora", "loha", "lokr", "vera", "oft", "boft", "hra", "miss", "road",
          "randlora", "c3a", "vblora", "fourierft", "waveft", "shira", "delora", "hira", "gralora")  # fmt: skip
PROMPTS = [
    torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(9, 15)
]


def tuned(name="lora", base=None, move=0.02):
    adapted = laws.attach(registry.make("methods", name), network("llama") if base is None else base)
    with torch.no_grad():
        for index, parameter in enumerate(adapted.trainable().values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_((move * noise).to(parameter.dtype))
    adapted.model.eval()
    return adapted


def everything(model):
    return {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.state_dict(keep_vars=True).items()}


def unchanged(model, before):
    after = everything(model)
    assert after.keys() == before.keys()
    for name, (parameter, pointer, values) in before.items():
        assert after[name][0] is parameter
        assert after[name][1] == pointer
        assert torch.equal(after[name][2], values)


@pytest.mark.parametrize("name", FOLDED)
def test_folded_answers_are_the_attached_ones_and_nothing_stays(name):
    model = tuned(name).model
    before, forwards = everything(model), {m: m.__dict__.get("forward") for m in model.modules()}
    logits = laws.logits(model)
    attached = generate(model, PROMPTS, decode=str, stop_ids=frozenset(), max_new_tokens=6)
    with folded(model, PROMPTS, 6, least=0) as found:
        assert found.folded, found.why
        inside = everything(model)
        assert not all(torch.equal(values, inside[place][2]) for place, (_, _, values) in before.items())
        torch.testing.assert_close(laws.logits(model), logits, rtol=0, atol=1e-3)
        answers = generate(model, PROMPTS, decode=str, stop_ids=frozenset(), max_new_tokens=6)
    assert [a.ids for a in answers] == [a.ids for a in attached]
    unchanged(model, before)
    assert forwards == {m: m.__dict__.get("forward") for m in model.modules()}
    assert torch.equal(laws.logits(model), logits)


def test_it_is_left_as_it_was_after_an_error():
    model = tuned().model
    before = everything(model)
    with pytest.raises(KeyboardInterrupt), folded(model, PROMPTS, 6, least=0):
        raise KeyboardInterrupt
    unchanged(model, before)


def test_training_goes_on_as_if_nothing_had_been_folded():
    def gradient(between):
        adapted = tuned()
        if between:
            with folded(adapted.model, PROMPTS, 6, least=0) as found:
                assert found.folded
        adapted.model.train()
        adapted.model(input_ids=laws.IDS, labels=laws.IDS).loss.backward()
        return [p.grad for p in adapted.trainable().values()]

    assert all(map(torch.equal, gradient(False), gradient(True)))


def test_little_work_leaves_the_adapter_attached():
    model = tuned().model
    with folded(model, PROMPTS, 6) as found:
        assert found == folding.Folding(False)
    assert folding.work(PROMPTS, 6) == sum(map(len, PROMPTS)) + 36
    shared = [[*range(100), n] for n in range(5)]
    assert folding.work(shared, 2) == 100 + 5 + 10


def test_a_base_has_nothing_to_fold():
    adapted = tuned()
    with adapted.disabled(), folded(adapted.model, PROMPTS, 6, least=0) as found:
        assert found == folding.Folding(False)
    with folded(network("llama"), PROMPTS, 6, least=0) as found:
        assert found == folding.Folding(False)


@pytest.mark.parametrize("tolerance", [-1.0, 1e9])
def test_answers_that_would_change_are_refused_and_told(tolerance, monkeypatch):
    model = tuned().model
    before = everything(model)
    if tolerance > 0:  # only the next token differs
        monkeypatch.setattr(folding._Kept, "fold", lambda self: "")
        monkeypatch.setattr(folding, "_logprobs", Flipping())
    monkeypatch.setitem(folding.TOLERANCE, torch.float32, tolerance)
    with folded(model, PROMPTS, 6, least=0) as found:
        assert not found.folded
        assert ("off by" if tolerance < 0 else "another next token") in found.why
        unchanged(model, before)
    unchanged(model, before)


class Flipping:
    """Log-probabilities whose best token changes after the probes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, ids):
        self.calls += 1
        best = 0 if self.calls <= folding.PROBES else 1
        return torch.nn.functional.one_hot(torch.tensor([best]), 3).float()


def test_tied_weights_are_left_alone():
    base = network("llama")
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    model = tuned({"name": "lora", "target_modules": ["lm_head"]}, base=base).model
    with folded(model, PROMPTS, 6, least=0) as found:
        assert not found.folded


@pytest.mark.parametrize("agrees", [True, False])
def test_a_judge_folds_while_it_asks_and_says_where_it_cannot(agrees, tmp_path, monkeypatch):
    folder = catalog.locate("tiny")
    model = tuned(base=load.load_model(folder, dtype="float32")).model
    examples = [
        Example((Message("user", f"Is {n} red?"), Message("assistant", "no")), Origin("f", n)) for n in range(9)
    ]
    judge = Judge(
        examples=examples, shots_from=examples, template=registry.make("templates", "chat"),
        tokenizer=Tokenizer.from_folder(folder), settings=EvaluateSpec(max_new_tokens=600), folder=tmp_path, identity={},
    )  # fmt: skip
    inside, events = [], []

    def asked(model, prompts, **options):
        inside.append([layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer)])
        return [Completion("no", (1,), "end", (-1.0, -1.0)) for _ in prompts]

    monkeypatch.setattr("luthier.model.generate.generate", asked)
    if not agrees:
        monkeypatch.setitem(folding.TOLERANCE, torch.float32, -1.0)
    before = everything(model)
    judge.answers("tuned", model, events.append, key="k")
    assert inside
    assert all(inside[0]) == agrees
    assert [type(event).__name__ for event in events] == ([] if agrees else ["Note"])
    unchanged(model, before)
