"""The flat master is AdamW; schedules are what they say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import CheckpointError, TrainingError
from luthier.spec import TrainSpec
from luthier.training.optim import Master, scale

LOOSE = 1e9  # a clip that never bites


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(1)
    return {f"p{i}": torch.nn.Parameter(torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)}


def run(shapes: list[tuple[int, ...]], spec: TrainSpec, groups: dict[str, dict[str, float]], steps: int = 15):
    """Train the same parameters through Master and through torch's AdamW on the separate tensors."""
    ours = parameters(shapes)
    theirs = copy.deepcopy(ours)
    master = Master(ours, spec, groups)
    reference = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": groups.get(n, {}).get("weight_decay", spec.weight_decay),
                "scale": groups.get(n, {}).get("lr_scale", 1.0),
            }
            for n, p in theirs.items()
        ],
        betas=spec.betas,
        fused=True,
    )
    for step in range(steps):
        rate = 1e-2 / (step + 1)
        grads = {name: torch.randn_like(p) for name, p in ours.items()}
        for name, grad in grads.items():
            ours[name].grad, theirs[name].grad = grad.clone(), grad / 4.0
        master.collect()
        torch.nn.utils.clip_grad_norm_(theirs.values(), spec.clip)
        for group in reference.param_groups:
            group["lr"] = rate * group["scale"]
        reference.step()
        master.step(4.0, rate)
    return ours, theirs


@pytest.mark.parametrize("groups", [{}, {"p1": {"lr_scale": 4.0}, "p2": {"weight_decay": 0.5}}])
def test_equals_adamw_on_separate_tensors_exactly(groups) -> None:
    """Sizes are multiples of a vector register, so that both run the same instructions on each number."""
    spec = TrainSpec(weight_decay=0.1, clip=LOOSE, betas=(0.9, 0.95))
    ours, theirs = run([(16, 64), (64, 16), (64,), (4, 4, 16)], spec, groups)
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def test_equals_adamw_on_odd_sizes_and_with_clipping() -> None:
    ours, theirs = run([(3, 5), (1,), (7,), (33, 2)], TrainSpec(weight_decay=0.1, clip=0.5), {"p3": {"lr_scale": 0.1}})
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_bf16_parameters_keep_small_updates_in_the_master() -> None:
    """An update far below bf16's resolution vanishes on the parameter itself and adds up in the master."""
    params = {"p": torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))}
    master = Master(params, TrainSpec(clip=LOOSE))
    for _ in range(1000):
        params["p"].grad = torch.ones(64, dtype=torch.bfloat16)
        master.collect()
        master.step(1.0, 1e-5)
    assert torch.allclose(master.master, torch.full((64,), 0.99), atol=1e-4)
    assert torch.equal(params["p"], torch.full((64,), 0.99).bfloat16())


def test_bf16_gradients_are_added_in_float32() -> None:
    params = {"p": torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))}
    master = Master(params, TrainSpec())
    for _ in range(512):
        params["p"].grad = torch.ones(8, dtype=torch.bfloat16)
        master.collect()
    assert torch.equal(master.grad, torch.full((8,), 512.0))  # in bfloat16 256 + 1 is 256
    assert params["p"].grad is None


def test_norm_is_before_clipping_and_a_bad_one_changes_nothing() -> None:
    params = parameters([(4,)])
    master = Master(params, TrainSpec(clip=1.0))
    params["p0"].grad = torch.full((4,), 6.0)
    master.collect()
    assert master.step(2.0, 1e-3) == pytest.approx(6.0)
    before = {name: tensor.clone() for name, tensor in master.state().items()}
    params["p0"].grad = torch.tensor([1.0, math.nan, 1.0, 1.0])
    master.collect()
    assert math.isnan(master.step(2.0, 1e-3))
    for name, tensor in master.state().items():
        assert torch.equal(tensor, before[name])


def test_state_round_trip_continues_exactly() -> None:
    first = Master(one := parameters([(16, 3), (5,)]), TrainSpec(weight_decay=0.1))
    second = Master(other := parameters([(16, 3), (5,)]), TrainSpec(weight_decay=0.1))
    torch.manual_seed(2)
    grads = [[torch.randn_like(p) for p in one.values()] for _ in range(6)]

    def push(master: Master, params: dict[str, torch.nn.Parameter], chunk: list[list[torch.Tensor]]) -> None:
        for step in chunk:
            for p, grad in zip(params.values(), step, strict=True):
                p.grad = grad.clone()
            master.collect()
            master.step(1.0, 1e-2)

    push(first, one, grads[:3])
    second.restore(first.state())
    push(first, one, grads[3:])
    push(second, other, grads[3:])
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name]), name
    assert first.optimiser_step == 6


def test_a_state_of_another_adapter_is_refused() -> None:
    state = Master(parameters([(4,)]), TrainSpec()).state()
    with pytest.raises(CheckpointError, match="does not fit"):
        Master(parameters([(5,)]), TrainSpec()).restore(state)


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nothing is trainable"):
        Master({}, TrainSpec())


schedules = st.sampled_from(["cosine", "linear", "constant"])


@given(schedules, st.integers(1, 500), st.floats(0, 0.99))
def test_schedules_rise_then_never_rise_again_and_stay_above_zero(schedule: str, total: int, warmup: float) -> None:
    values = [scale(step, total, schedule=schedule, warmup=warmup) for step in range(total)]
    assert all(0 < value <= 1 for value in values)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert max(values) == 1.0  # the peak is reached however short the run


def test_schedule_values() -> None:
    def at(step: int, schedule: str) -> float:
        return scale(step, 110, schedule=schedule, warmup=10 / 110)

    assert at(0, "cosine") == pytest.approx(1 / 11)
    assert at(10, "cosine") == 1.0
    assert at(60, "cosine") == pytest.approx(0.5)
    assert at(60, "linear") == pytest.approx(0.5)
    assert at(35, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert at(109, "constant") == 1.0
    assert at(109, "linear") == pytest.approx(0.01)
