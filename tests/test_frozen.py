"""States of frozen lower layers are kept: the same losses, gradients and weights, with the layers below never run."""

from __future__ import annotations

import dataclasses

import networks
import pytest
import torch
import toy

from luthier import registry
from luthier.model import frozen
from luthier.model.batch import Batch
from luthier.model.logprob import logprobs
from luthier.model.passing import layers_of, passing
from luthier.text import pack
from luthier.training.loop import Training

CASES = [(kind, method) for kind in networks.KINDS for method in ("top", "head", "adapters")]
METHODS = {
    "top": {"name": "layers", "last": 1},
    "head": {"name": "head"},
    "adapters": {"name": "bottleneck", "size": 4, "layers": [2]},
}
DEPTHS = {"top": 2, "head": 3, "adapters": 2}


def tuned(kind: str, method: str):
    made = registry.make("methods", METHODS[method])
    return made, made.attach(networks.network(kind), seed=0)


def packs_of(rows, budget=64):
    return pack.plan(rows, budget=budget)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_entering_at_a_layer_gives_the_same_log_probabilities_and_gradients(kind, method):
    _, adapted = tuned(kind, method)
    rows = toy.rows(12)
    count = frozen.depth(adapted.model)
    assert count == DEPTHS[method]
    kept = frozen.keep(adapted.model, packs_of(rows), count)
    for other in packs_of(rows[3:9][::-1], budget=40):  # put together in another way than they were kept
        entry = kept.entry(other)
        assert entry is not None
        found = []
        for way in (None, entry):
            out = logprobs(adapted.model, Batch.of(other).entered(way))
            found.append((out.detach(), torch.autograd.grad(out.sum(), list(adapted.trainable().values()))))
        (usual, slopes), (entered, others) = found
        torch.testing.assert_close(entered, usual, rtol=1e-4, atol=1e-5)
        for one, two in zip(slopes, others, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_the_layers_below_do_not_run():
    _, adapted = tuned("llama", "top")
    rows = toy.rows(6)
    kept = frozen.keep(adapted.model, packs_of(rows), 2)
    ran = []
    for index, layer in enumerate(layers_of(adapted.model)):
        layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    (one,) = packs_of(rows[:2], budget=200)
    logprobs(adapted.model, Batch.of(one).entered(kept.entry(one)))
    assert ran == [2]


@pytest.mark.parametrize("method", list(METHODS))
def test_training_over_epochs_ends_with_the_same_weights(method):
    asked = toy.settings(epochs=3.0)
    ends = []
    for keeps in (False, True):
        made, adapted = tuned("llama", method)
        rows = toy.rows(20)
        fresh = torch.cat([value.detach().flatten() for value in adapted.trainable().values()])
        packs = packs_of(rows)
        kept = frozen.keep(adapted.model, packs, frozen.depth(adapted.model)) if keeps else None
        more = {"method": made, "dev_packs": packs[:1], "lower": kept}
        losses = [
            step.loss
            for step in Training(adapted, registry.make("objectives", "sft"), toy.feed(asked, rows), asked, **more)
        ]
        end = torch.cat([value.detach().flatten() for value in adapted.trainable().values()])
        ends.append((losses, end - fresh))
    (usual, way), (quick, other) = ends
    assert quick == pytest.approx(usual, rel=1e-4)
    assert float((other - way).norm() / way.norm()) < 0.02  # AdamW's first steps make much of a gradient's last bits


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 2}, {"name": "prompt", "tokens": 2}, {"name": "full"}])
def test_methods_that_learn_at_the_bottom_keep_nothing(method):
    adapted = registry.make("methods", method).attach(networks.network("llama"), seed=0)
    assert frozen.depth(adapted.model) == 0


def test_dropout_below_keeps_nothing():
    _, adapted = tuned("llama", "top")
    adapted.model.config.attention_dropout = 0.1
    assert frozen.depth(adapted.model) == 0


def test_a_model_that_adds_to_what_enters_it_is_told_apart():
    _, adapted = tuned("gpt2", "top")
    packs = packs_of(toy.rows(4))
    count = frozen.depth(adapted.model)
    if count:
        kept = frozen.keep(adapted.model, packs, count)
        assert "changes what enters" in frozen.differs(adapted.model, kept, packs[0])
    other = tuned("llama", "top")[1]
    kept = frozen.keep(other.model, packs, 2)
    assert not frozen.differs(other.model, kept, packs[0])
    wrong = dataclasses.replace(kept, states=kept.states + 0.1)
    assert "changes what enters" in frozen.differs(other.model, wrong, packs[0])


def test_a_row_that_is_not_kept_is_computed():
    _, adapted = tuned("llama", "top")
    kept = frozen.keep(adapted.model, packs_of(toy.rows(4)), 2)
    (strange,) = packs_of(toy.rows(30, seed=5)[-1:])
    assert kept.entry(strange) is None


def test_layers_are_put_back_as_they_were():
    model = networks.network("llama")
    first = layers_of(model)[0]
    first.forward = own = first.forward
    with passing(layers_of(model)):
        assert first.forward is not own
    assert first.forward is own
    assert "forward" not in layers_of(model)[1].__dict__


def test_paths_cover_their_rows():
    rows = toy.rows(9)
    for one in packs_of(rows, budget=50):
        by_id = {row.example_id: row for row in rows}
        paths = pack.paths(one)
        for name, path in zip(one.rows, paths, strict=True):
            ids = tuple(one.ids[path].tolist())
            assert ids == by_id[name].ids[: len(ids)]
            assert (one.positions[path] == range(len(ids))).all()
        assert set().union(*(path.tolist() for path in paths)) == set(range(len(one)))
