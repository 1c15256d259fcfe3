"""The law of prefix trees: loss and gradient equal those of separately run rows."""

from __future__ import annotations

import random

import pytest
import torch
from networks import KINDS, VOCABULARY, network
from torch.nn import functional as F

from luthier.errors import ModelError
from luthier.model.attention import Tree, attending, recompute_activations, shares_prefixes
from luthier.model.batch import Batch
from luthier.model.logprob import logprobs
from luthier.model.proof import prove_sharing
from luthier.records import Rendered
from luthier.text.pack import plan

BOUND = 1e-5


def rows(seed: int, count: int = 9) -> list[Rendered]:
    """Rows of one, two or no shared levels, with signed weights, twins, and one that is another's prefix."""
    rng = random.Random(seed)
    stem, more = ([rng.randrange(VOCABULARY) for _ in range(n)] for n in (60, 40))
    made = []
    for index in range(count):
        prompt = (
            [rng.randrange(VOCABULARY) for _ in range(5)]
            if index % 5 == 0
            else [*stem, *(more if index % 3 == 0 else [])]
        )
        answer = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 30))]
        weights = [0.0] * len(prompt) + [rng.choice([1.0, 0.5, -0.7]) for _ in answer]
        made.append(Rendered((*prompt, *answer), tuple(weights), len(prompt), str(index)))
    prefix = Rendered(made[1].ids[:62], (0.0,) * 60 + (1.0, 1.0), 60, "prefix")
    return [*made, made[-1], prefix]


def separately(model, made):
    total = torch.zeros(())
    for row in made:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total = total + (F.cross_entropy(logits, ids[0, 1:], reduction="none") * torch.tensor(row.weights[1:])).sum()
    return total


def as_trees(model, made, *, budget, share, form, chunk=512):
    total = torch.zeros(())
    for pack in plan(made, budget=budget, share=share):
        batch = Batch.of(pack, "cpu", form)
        total = total - (logprobs(model, batch, chunk=chunk) * batch.target_weights).sum()
    return total


def gradient(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["cascade", "dense"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [4000, 300])
def test_loss_and_gradient_equal_separate_rows(kind, form, share, budget):
    model = network(kind).requires_grad_(True)
    made = rows(budget)
    oracle = separately(model, made)
    expected = gradient(model, oracle)
    loss = as_trees(model, made, budget=budget, share=share, form=form)
    assert abs(float((loss - oracle).detach())) <= BOUND * abs(float(oracle.detach()))
    assert gap(gradient(model, loss), expected) <= BOUND


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_blocks_of_tokens_give_the_same_loss(kind, share):
    model = network(kind)
    made = rows(7)
    oracle = float(separately(model, made))
    with torch.no_grad():  # FlexAttention has no backward pass on a CPU
        loss = float(as_trees(model, made, budget=4000, share=share, form="flex"))
    assert abs(loss - oracle) <= BOUND * abs(oracle)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("soft", [0, 3])
def test_blocks_hold_the_mask(window, soft):
    for one in plan(rows(11), budget=160):
        tree = Tree.of(one, form="flex")
        tree = tree.rooted(soft) if soft else tree
        wanted = tree.mask(window)
        place = torch.arange(tree.size)
        sees = tree.blocks(window).mask_mod
        assert torch.equal(sees(0, 0, place[:, None], place[None, :]), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_tokens_give_the_same_gradient_on_a_gpu(kind):
    model = network(kind).requires_grad_(True).cuda()
    made = rows(7)
    expected = gradient(model, separately(model, made))
    loss = as_trees(model, made, budget=4000, share=True, form="flex")
    assert gap(gradient(model, loss), expected) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_head_gives_the_same_gradient(kind):
    model = network(kind).requires_grad_(True)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(False)
    made = rows(1)
    expected = gradient(model, separately(model, made))
    loss = as_trees(model, made, budget=4000, share=True, form="cascade", chunk=7)
    assert gap(gradient(model, loss), expected) <= BOUND


@pytest.mark.parametrize("form", ["cascade", "dense"])
def test_gradient_checkpointing_changes_nothing(form):
    model = network("llama").requires_grad_(True)
    made = rows(2)
    expected = gradient(model, as_trees(model, made, budget=4000, share=True, form=form))
    recompute_activations(model)
    model.train()
    got = gradient(model, as_trees(model, made, budget=4000, share=True, form=form))
    assert torch.equal(got, expected)


def test_bfloat16_stays_close():
    model = network("llama").requires_grad_(True)
    made = rows(3)
    expected = gradient(model, separately(model, made))
    model = network("llama").requires_grad_(True).to(torch.bfloat16)
    got = gradient(model, as_trees(model, made, budget=4000, share=True, form="cascade")).float()
    assert gap(got, expected) < 0.1


def test_without_its_tree_attention_raises():
    model = network("llama")
    with attending(model), pytest.raises(ModelError, match="tree"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    model(input_ids=torch.tensor([[1, 2, 3]]))  # and the model's own way is back


def test_a_tree_knows_who_sees_whom():
    made = [Rendered((*range(30), 100 + i, 1, 2), (0.0,) * 31 + (1.0, 1.0), 31, str(i)) for i in range(3)]
    (pack,) = plan(made, budget=4096)
    tree = Tree.of(pack)
    sees = tree.mask(None)
    assert sees[30:32].sum(1).tolist() == [31, 32]
    assert sees[32:34].sum(1).tolist() == [31, 32], "branches do not see each other"
    assert tree.mask(5)[-1].sum() == 5, "a window counts positions, not places in the pack"


def test_architectures_that_cannot_share_are_named():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(config).eval()
    assert "mamba" in shares_prefixes(model)
    made = rows(4, count=4)
    with pytest.raises(ModelError, match="share=False"):
        as_trees(model, made, budget=4000, share=True, form="auto")
    model.requires_grad_(True)
    oracle = separately(model, made)
    loss = as_trees(model, made, budget=4000, share=False, form="auto")
    assert abs(float((loss - oracle).detach())) <= BOUND * abs(float(oracle.detach()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_lets_exact_models_pass(kind):
    assert prove_sharing(network(kind), rows(5)) == ""


def test_the_guard_catches_a_model_with_a_way_of_its_own():
    model = network("llama")
    usual = model.lm_head.forward
    model.lm_head.forward = lambda states: (
        usual(states) * (3.0 if states.dim() == 3 else 1.0)
    )  # scales in its own forward
    model.lm_head.weight.requires_grad_(True)
    assert "differ" in prove_sharing(model, rows(6))
    assert "differ" in shares_prefixes(model), "from now on its rows run apart"
    with pytest.raises(ModelError, match="share=False"):
        as_trees(model, rows(6), budget=4000, share=True, form="auto")
