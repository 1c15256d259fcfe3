"""The forecast's arithmetic, against the figures that were counted by hand."""

from __future__ import annotations

from pathlib import Path

import networks
import pytest
import torch
import toy

from luthier.training.plan import (
    ModelFacts,
    Tally,
    facts_of,
    facts_of_folder,
    flops,
    measure,
    peak_bytes,
    plan,
    tally,
    tally_packs,
)

SMOL = ModelFacts(
    parameters=134_515_008, body=106_203_456, layers=30, hidden=576, feed_forward=1536, vocabulary=49_152, bytes_per_weight=2
)  # fmt: skip
RANK_16 = 4_884_480


def work(tokens: int = 1000, supervised: int = 0, largest: int = 1000) -> Tally:
    return Tally(tokens, 3 * tokens, supervised, largest, 10)


def test_flops_per_token_and_per_target() -> None:
    """0.454 GFLOP per token of body, 0.676 with checkpointing, 0.113 per supervised position."""
    body = flops(SMOL, RANK_16, work())
    assert body / 1000 == pytest.approx(0.454e9, rel=0.01)
    assert flops(SMOL, RANK_16, work(), checkpointing=True) / 1000 == pytest.approx(0.676e9, rel=0.01)
    assert (flops(SMOL, RANK_16, work(supervised=1000)) - body) / 1000 == pytest.approx(0.113e9, rel=0.01)


def test_full_tuning_costs_six_per_parameter() -> None:
    assert flops(SMOL, SMOL.body, work()) == pytest.approx(6 * SMOL.body * 1000)


def test_kept_for_backward_grows_with_the_pack_and_not_with_checkpointing() -> None:
    small, large = (peak_bytes(SMOL, RANK_16, work(largest=size)) for size in (1000, 2000))
    assert (large - small) / 1000 == pytest.approx(562e3, rel=0.05)
    small, large = (peak_bytes(SMOL, RANK_16, work(largest=size), checkpointing=True) for size in (1000, 2000))
    assert (large - small) / 1000 < 60e3


def test_a_forecast_is_a_range_and_scales() -> None:
    one = plan(SMOL, trainable=RANK_16, work=work(), gigaflops=100)
    two = plan(SMOL, trainable=RANK_16, work=work(2000), gigaflops=200)
    assert one.seconds_low < one.seconds < one.seconds_high
    assert one.seconds == pytest.approx(two.seconds)
    assert one.sharing_factor == 3.0
    looked = plan(SMOL, trainable=RANK_16, work=work(), gigaflops=100, evaluations=2, dev=work(500))
    assert looked.seconds / one.seconds == pytest.approx(1.5, rel=0.05)


def test_the_tally_of_a_sample_is_close_to_the_run() -> None:
    asked = toy.settings(epochs=10)
    feed = toy.feed(asked, toy.rows(200))
    guess = tally(feed)
    whole = tally_packs([one for batch in toy.feed(asked, toy.rows(200)) for one in batch.packs])
    assert guess.tokens == pytest.approx(whole.tokens, rel=0.2)
    assert guess.supervised == whole.supervised
    assert guess.largest_pack <= whole.largest_pack
    assert feed.state() == {"step": 0}


def test_this_machine_multiplies() -> None:
    small = ModelFacts(1, 1, 1, 64, 128, 10, 4)
    assert 0.01 < measure(small, dtype=torch.float32, seconds=0.01) < 1e6


@pytest.mark.parametrize("kind", networks.KINDS)
def test_sizes_read_from_a_folder_are_those_of_the_loaded_model(tmp_path: Path, kind: str) -> None:
    model = networks.network(kind)
    model.save_pretrained(tmp_path)
    facts = facts_of(model)
    assert facts_of_folder(tmp_path, bytes_per_weight=4) == facts
    assert facts.body == sum(p.numel() for name, p in model.named_parameters() if "layers" in name or "norm" in name)
