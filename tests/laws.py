"""The laws of a tuning method as functions of a factory, so that they can be held against broken methods too.

Each takes `make`, which returns a fresh method each time it is called; a law that does not hold raises AssertionError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from networks import network
from safetensors.torch import load_file
from torch.nn import functional as F

from luthier.adapt.folder import CONFIG, OWN, WEIGHTS
from luthier.model.attention import recompute_activations
from luthier.model.batch import Batch
from luthier.model.generate import generate
from luthier.model.logprob import logprobs
from luthier.records import Loss, Rendered
from luthier.spec import TrainSpec
from luthier.text import pack
from luthier.training.checkpoint import Checkpoints
from luthier.training.feed import ShuffledFeed
from luthier.training.loop import Training

Make = Callable[[], Any]
IDS = torch.tensor([[5, 9, 40, 77, 3, 8, 120, 44]])
STEPS = 12
# Methods whose layers round differently when rows lie side by side (FFTs, large sums); relative, all float32.
BOUND = 2e-5


class TestEvidence:
    """What a run would tell a method about itself; the rows are random."""

    __test__ = False
    total_steps = STEPS

    def __init__(self, model: Any) -> None:
        self.model = model

    def losses(self, count: int) -> Iterator[Loss]:
        for row in rows(3)[:count]:
            (single,) = pack.plan([row], budget=4096)
            batch = Batch.of(single, "cpu")
            yield Loss(-(logprobs(self.model, batch) * batch.target_weights).sum(), float(len(batch.target_ids)))


class Sft:
    """The mean loss over targets, as an objective."""

    def loss(self, logprobs: torch.Tensor, batch: Any) -> Loss:
        return Loss(-(logprobs * batch.target_weights).sum(), float(batch.target_weights.sum()))


def rows(seed: int, count: int = 7) -> list[Rendered]:
    """Rows that share a prompt of 40 tokens, half of them 20 more; one that shares nothing."""
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> list[int]:
        return torch.randint(0, 200, (n,), generator=generator).tolist()

    stem, more, made = some(40), some(20), []
    for index in range(count):
        prompt = some(6) if index == 3 else [*stem, *(more if index % 2 else [])]
        answer = some(3 + index)
        made.append(Rendered((*prompt, *answer), (0.0,) * len(prompt) + (1.0,) * len(answer), len(prompt), str(index)))
    return made


def attach(method: Any, base: Any, seed: int = 0) -> Any:
    return method.attach(base, seed=seed, evidence=TestEvidence(base))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits[:, -ids.shape[1] :]


def train(adapted: Any, method: Any, steps: int = STEPS, rate: float | None = None) -> list[float]:
    """Learn to say IDS in the manner of the training loop; return the losses."""
    parameters = adapted.trainable()
    rate = rate or 10 * method.learning_rate
    groups = method.groups(list(parameters))
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rate * groups.get(n, {}).get("lr_scale", 1.0)} for n, p in parameters.items()]
    )
    losses = []
    adapted.model.train()
    for done in range(steps):
        loss = adapted.model(input_ids=IDS, labels=IDS).loss
        penalty = adapted.penalty()
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        with torch.no_grad():
            adapted.stepped(done + 1, steps, {n: p.grad for n, p in parameters.items() if p.grad is not None})
        losses.append(float(loss.detach()))
    adapted.model.eval()
    return losses


def fresh_changes_nothing(make: Make, kind: str = "llama") -> None:
    method, base = make(), network(kind)
    before = logits(base)
    after = logits(attach(method, base).model)
    if method.fresh == "exact":
        assert torch.equal(before, after)
    elif method.fresh == "tolerance":
        assert torch.allclose(before, after, atol=1e-4)
    else:
        assert method.fresh.startswith("changes: ")


def it_learns(make: Make) -> None:
    method = make()
    adapted = attach(method, network("llama"))
    losses = train(adapted, method)
    assert losses[-1] < losses[0] - 0.02, losses


def only_the_adapter_learns(make: Make) -> None:
    method, base = make(), network("llama")
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = attach(method, base)
    trainable = adapted.trainable()
    assert trainable
    assert {id(p) for p in adapted.model.parameters() if p.requires_grad} <= {id(p) for p in trainable.values()}
    losses = train(adapted, method)
    assert not any(math.isnan(value) for value in losses)
    assert all(p.grad is not None for p in trainable.values())
    plain = adapted.detach().state_dict()
    assert plain.keys() == kept.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in kept.items())


def disabled_and_detached_are_the_base(make: Make) -> None:
    method, base = make(), network("llama")
    before = logits(base)
    adapted = attach(method, base)
    train(adapted, method)
    after = logits(adapted.model)
    assert not torch.equal(after, before)
    with adapted.disabled():
        assert torch.equal(logits(adapted.model), before)
    assert torch.equal(logits(adapted.model), after)
    plain = adapted.detach()
    assert torch.equal(logits(plain), before)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not any(p.requires_grad for p in plain.parameters())
    again = attach(make(), plain)  # another adapter finds a clean base
    assert again.trainable()


def first_values_come_from_the_seed_alone(make: Make) -> None:
    torch.manual_seed(5)
    one = attach(make(), network("llama"), seed=3).trainable()
    torch.manual_seed(99)
    other = attach(make(), network("llama"), seed=3).trainable()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    attach(make(), network("llama"), seed=3)
    assert torch.equal(torch.rand(1), expected), "the caller's randomness is left alone"


def saved_and_loaded_is_the_same(make: Make, folder: Path) -> None:
    method = make()
    adapted = attach(method, network("llama"))
    train(adapted, method)
    adapted.save(folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert adapted.saved_bytes() == sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    again = make().load(network("llama"), folder)
    assert torch.equal(logits(again.model), logits(adapted.model))
    twice = folder / "again"
    twice.mkdir()
    again.save(twice)
    assert (twice / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def peft_alone_loads_it_or_names_luthier(make: Make, folder: Path) -> None:
    from peft import PeftModel

    method = make()
    adapted = attach(method, network("llama"))
    train(adapted, method)
    adapted.save(folder)
    if OWN in (folder / CONFIG).read_text():
        try:
            PeftModel.from_pretrained(network("llama"), folder)
        except Exception as error:
            assert "LUTHIER" in str(error)
            return
        raise AssertionError("plain PEFT took a folder that it cannot understand")
    plain = PeftModel.from_pretrained(network("llama"), folder, autocast_adapter_dtype=False).eval()
    assert torch.allclose(logits(plain), logits(adapted.model), atol=1e-6)


def merged_equals_attached(make: Make) -> None:
    method = make()
    if method.not_merged:
        return
    adapted = attach(method, network("llama"))
    train(adapted, method)
    attached = logits(adapted.model)
    merged = adapted.merge()
    assert torch.allclose(logits(merged), attached, atol=5e-4)
    assert type(merged).__name__ == "LlamaForCausalLM"


def _separately(model: Any, made: list[Rendered]) -> torch.Tensor:
    total = torch.zeros(())
    for row in made:
        ids = torch.tensor([row.ids])
        table = model(input_ids=ids).logits[0, -len(row.ids) : -1].float()
        weights = torch.tensor(row.weights[1:])
        total = total + (F.cross_entropy(table, ids[0, 1:], reduction="none") * weights).sum()
    return total


def _together(model: Any, made: list[Rendered], form: str) -> torch.Tensor:
    total = torch.zeros(())
    for one in pack.plan(made, budget=4096):
        batch = Batch.of(one, "cpu", form)
        total = total - (logprobs(model, batch) * batch.target_weights).sum()
    return total


def _gradients(adapted: Any, loss: torch.Tensor) -> torch.Tensor:
    parameters = list(adapted.trainable().values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def trees_equal_separate_rows(make: Make, kind: str = "llama", form: str = "cascade", recompute: bool = False) -> None:
    """Loss and gradient of prefix-tree packs are those of rows run one by one, checkpointed or not."""
    method = make()
    adapted = attach(method, network(kind))
    train(adapted, method, steps=3)
    made = rows(11)
    loss = _separately(adapted.model, made)
    expected = _gradients(adapted, loss)
    if recompute:
        recompute_activations(adapted.model)
        adapted.model.train()
    packed = _together(adapted.model, made, form)
    assert abs(float(packed.detach() - loss.detach())) <= BOUND * abs(float(loss.detach()))
    found = _gradients(adapted, packed)
    assert float((found - expected).norm()) <= 10 * BOUND * float(expected.norm())


def generation_is_the_models_own(make: Make) -> None:
    """Greedy answers over a shared prompt are those of the model's plain forward, token by token."""
    method = make()
    adapted = attach(method, network("llama"))
    train(adapted, method)
    prompts = [row.ids[: row.prompt_length] for row in rows(5, 3)]
    answers = generate(adapted.model, prompts, decode=lambda ids: "", stop_ids={199}, max_new_tokens=6, batch_size=3)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token, logprob in zip(answer.ids, answer.logprobs, strict=False):
            table = torch.log_softmax(logits(adapted.model, torch.tensor([ids]))[0, -1].float(), -1)
            assert abs(float(table[token]) - logprob) < 1e-3
            assert float(table.max() - table[token]) < 1e-3
            ids.append(token)


def _run(make: Make, folder: Path | None, until: int, resume: bool) -> tuple[dict[str, torch.Tensor], Any]:
    method, base = make(), network("llama")
    adapted = attach(method, base)
    settings = TrainSpec(
        learning_rate=None, batch_size=2, max_steps=8, eval_every=2, save_every=1, patience=None, tokens_per_pack=512
    )
    feed = ShuffledFeed(
        [[row] for row in rows(2)], batch_size=2, seed=1, epochs=50, max_steps=8, budget=512, share=True
    )
    training = Training(
        adapted, Sft(), feed, settings, method=method, dev_packs=pack.plan(rows(4), budget=512),
        checkpoints=Checkpoints(folder, keep=20) if folder else None, resume=resume,
    )  # fmt: skip
    for step in training:
        if step.index == until:
            break
    state = {name: p.detach().clone() for name, p in adapted.trainable().items()}
    return {**state, **adapted.state()}, adapted


def it_survives_a_kill(make: Make, folder: Path) -> None:
    """Stopped after step 5 and resumed, a run ends with the bytes of an unbroken one."""
    whole, one = _run(make, folder / "whole", 99, False)
    _run(make, folder / "broken", 5, False)
    resumed, other = _run(make, folder / "broken", 99, True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    one.model.eval(), other.model.eval()
    assert torch.equal(logits(one.model), logits(other.model))


def damage_is_refused(make: Make, folder: Path, damage: str) -> None:
    """A tensor missing, extra, misshapen or not finite, or another base, is an error and never a guess."""
    from safetensors.torch import save_file

    from luthier.errors import CheckpointError, SpecError

    method = make()
    attach(method, network("llama")).save(folder)
    path = folder / WEIGHTS
    tensors = load_file(path)
    first = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    if damage == "missing":
        del tensors[first]
    elif damage == "extra":
        tensors["base_model.model.other"] = torch.zeros(1)
    elif damage == "shape":
        tensors[first] = torch.zeros(3, 3, 3)
    elif damage == "nan":
        tensors[first] = torch.full_like(tensors[first], float("nan"))
    if damage == "garbage":
        path.write_bytes(b"\x80\x04pickle")
    else:
        save_file(tensors, path)
    base = network("gpt_neox" if damage == "other_base" else "llama")
    try:
        make().load(base, folder)
    except (CheckpointError, SpecError, ValueError) as error:
        if damage in ("missing", "shape", "nan"):
            assert first in str(error)
        return
    raise AssertionError(f"{damage} was not noticed")
