"""The arithmetic of a study: halving, budgets, rankings, forgetting, advice. No model but random ones."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from networks import network

from luthier import registry
from luthier.errors import UsageError
from luthier.evaluate import forgetting, speed, study_report
from luthier.evaluate.ranking import rank
from luthier.records import Rendered, Score
from luthier.training import budget, search
from luthier.training.budget import Closing, Cost, Shape
from luthier.training.search import Ask

BRACKET = (1e-4, 1e-2)


def run(loss_of, count=6, steps=(4, 8, 16), bracket=BRACKET):
    """Play a search against a function of rate and steps; return what it found and every rung that it asked for."""
    machine = search.search(bracket, count, steps)
    asks, rungs = next(machine), []
    while True:
        rungs.append(asks)
        try:
            asks = machine.send({ask: loss_of(ask.rate, ask.steps) for ask in asks})
        except StopIteration as end:
            return end.value, rungs


def bowl(best):
    return lambda rate, steps: (math.log(rate) - math.log(best)) ** 2 + 1 / steps


def test_rates_are_even_on_a_log_scale_and_short_to_write():
    assert search.rates((1e-4, 1e-2), 3) == [1e-4, 1e-3, 1e-2]
    found = search.rates((5e-5, 5e-3), 6)
    assert (found[0], found[-1]) == (5e-5, 5e-3)
    assert all(f"{rate:.1e}" == f"{float(f'{rate:.1e}'):.1e}" for rate in found)
    assert search.rates((1e-4, 1e-2), 1) == [1e-3]


@pytest.mark.parametrize("best", [3e-4, 1e-3, 3e-3])
def test_the_search_finds_the_bottom_with_half_of_the_trials_at_each_rung(best):
    found, rungs = run(bowl(best))
    assert [len(asks) for asks in rungs] == [6, 3, 2]
    assert [asks[0].steps for asks in rungs] == [4, 8, 16]
    nearest = min(search.rates(BRACKET, 6), key=lambda rate: abs(math.log(rate / best)))
    assert found.rate == nearest
    assert not found.widened and not found.at_edge
    assert len(found.curve) == 11


@pytest.mark.parametrize(("best", "outside"), [(2e-2, lambda r: r > 1e-2), (4e-5, lambda r: r < 1e-4)])
def test_a_bracket_whose_edge_wins_is_widened(best, outside):
    found, rungs = run(bowl(best))
    assert found.widened and all(outside(rate) for rate in found.widened)
    assert outside(found.rate) and abs(math.log(found.rate / best)) < 0.6
    assert all(len(asks) == 1 and asks[0].steps == 16 for asks in rungs[3:])


def test_a_bracket_is_widened_at_most_twice_and_the_edge_is_told():
    found, _ = run(bowl(5e-1), bracket=(1e-6, 1e-4))
    assert len(found.widened) == search.WIDENINGS
    assert found.at_edge and found.rate == max(rate for rate, _, _ in found.curve)


def test_no_rate_reaches_one():
    found, _ = run(lambda rate, steps: -rate, bracket=(1e-2, 0.9))
    assert found.rate == 0.9 and not found.widened


def test_diverged_trials_lose_and_do_not_stop_the_search():
    found, rungs = run(lambda rate, steps: math.inf if rate > 1e-3 else bowl(6e-4)(rate, steps))
    assert found.rate == 6.3e-4 and math.isfinite(found.loss)
    assert all(ask.rate <= 1e-3 for ask in rungs[1])


def test_where_all_diverge_lower_rates_are_tried():
    found, _ = run(lambda rate, steps: math.inf if rate > 9e-5 else 1.0)
    assert found.rate is not None and found.rate < 1e-4
    lost, _ = run(lambda rate, steps: math.inf)
    assert lost.rate is None and len(lost.widened) == search.WIDENINGS


def test_a_rate_that_diverges_only_late_is_not_chosen():
    late = lambda rate, steps: math.inf if rate > 1e-3 and steps == 16 else bowl(4e-3)(rate, steps)  # noqa: E731
    found, _ = run(late)
    assert found.rate == 6.3e-4, "the best of those that never diverged, from the rung before"


def test_ties_go_to_the_lower_rate():
    assert search.survivors({1e-3: 1.0, 1e-4: 1.0, 1e-2: 2.0, 1e-1: math.inf}) == [1e-4, 1e-3]


def test_rungs_double_up_to_half_of_the_run():
    assert search.lengths(96, 3) == (12, 24, 48)
    assert search.lengths(8, 3) == (4,) and search.lengths(12, 3) == (4, 6)
    assert search.lengths(2, 2) == (2,)


COSTS = {"a": Cost(1.0, 2.0, 0.5), "b": Cost(2.0, 2.0, 0.5), "c": Cost(0.5, 2.0, 0.5)}
AFTER = Closing(answers=20.0, others=10.0)


def test_the_forecast_counts_what_a_study_does():
    shape = Shape(4, (25, 50), 100, 3, 2)
    cost = COSTS["a"]
    rungs = 4 * (0.5 + 25 + 4) + 2 * (0.5 + 50 + 4) + (0.5 + 50 + 4)
    assert budget.searching(shape, cost) == pytest.approx(rungs)
    runs = sum(0.5 + 100 * cost.step + 10 * 2.0 for cost in COSTS.values()) * (1 + 2 * 2 / 3)
    closing = (3 + 2 * 2 + 1) * 20 + 3 * 10
    whole = sum(budget.searching(shape, one) for one in COSTS.values()) + runs + closing
    assert budget.forecast(shape, COSTS, AFTER, looks_every=10) == pytest.approx(whole)
    assert budget.forecast(shape, COSTS, AFTER, looks_every=10, width=2) == pytest.approx(
        (whole - closing) / 2 + closing
    )


@pytest.mark.parametrize("room", [250, 500, 1000, 2000, 4000, 1e9])
def test_the_richest_shape_that_fits_is_taken(room):
    found = budget.fit(room, 100, 3, 4, COSTS, AFTER, looks_every=50)
    assert found is not None
    assert budget.forecast(found, COSTS, AFTER, looks_every=50) <= room
    if room == 1e9:
        assert found == Shape(6, (13, 25, 50), 100, 3, 4)


def test_more_room_is_never_worse():
    worth = []
    for room in (200, 300, 500, 900, 1600, 3000, 6000):
        shape = budget.fit(room, 100, 3, 4, COSTS, AFTER, looks_every=50)
        order = list(budget.shapes(100, 3, 4))
        worth.append(len(order) if shape is None else order.index(shape))
    assert worth == sorted(worth, reverse=True) and len(set(worth)) > 4


def test_too_little_room_has_no_shape_and_says_what_is_needed():
    assert budget.fit(50, 100, 3, 4, COSTS, AFTER, looks_every=50) is None
    needed = budget.least(100, COSTS, AFTER, looks_every=50)
    found = budget.fit(needed, 100, 3, 4, COSTS, AFTER, looks_every=50)
    assert found is not None and found.rates > 1


def test_after_the_search_only_runs_can_change():
    before = Shape(4, (25, 50), 100, 1, 4)
    found = budget.fit(1e9, 100, 3, 4, COSTS, AFTER, looks_every=50, search_as=before)
    assert found == Shape(4, (25, 50), 100, 3, 4)
    assert Shape.of_json(found.as_json()) == found


def scores(values):
    return [Score(float(value)) for value in values]


def made(rng, n, gains, seeds=3, spread=0.0):
    """Answers right or wrong on rows of differing difficulty; each run's skill moves by `spread`."""
    hard = rng.normal(0, 1, n)
    systems = {
        f"m{place}": [
            scores(hard * 0.8 + rng.normal(0, 0.6, n) < gain + rng.normal(0, spread)) for _ in range(seeds)
        ]
        for place, gain in enumerate(gains)
    }  # fmt: skip
    return scores(hard > 1), systems


def test_equal_methods_tie_in_at_least_95_of_100_studies():
    rng = np.random.default_rng(0)
    studies, parted = 300, 0
    for study in range(studies):
        base, systems = made(rng, 60, [0.3] * 5, seeds=1 + study % 3, spread=0.1 * (study % 2))
        found = rank(base, systems, range(60), draws=200, seed=study)
        parted += any(not one.tied for one in found.systems.values())
    assert parted / studies <= 0.05


def test_a_clear_winner_is_found_and_the_others_are_behind():
    rng = np.random.default_rng(1)
    base, systems = made(rng, 300, [0.0, 1.2, 0.1])
    found = rank(base, systems, range(300))
    best = next(iter(found.systems))
    assert best == "m1" and found.systems["m1"].to_best is None
    assert [one.tied for one in found.systems.values()] == [True, False, False]
    for one in list(found.systems.values())[1:]:
        assert one.to_best.high < 0 and one.to_best.p <= 0.05
        assert one.low <= one.value <= one.high
    assert all(one.to_base.difference > 0 for one in found.systems.values())


def test_a_tie_never_has_an_interval_that_rules_zero_out():
    rng = np.random.default_rng(2)
    for study in range(30):
        base, systems = made(rng, 80, rng.normal(0.3, 0.25, 6))
        for one in rank(base, systems, range(80), draws=200, seed=study).systems.values():
            if one.to_best is not None:
                assert one.tied == (not one.to_best.clear)
                assert not one.tied or one.to_best.low <= 0 <= one.to_best.high


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 1, 200)
    calm = [scores(hard < 0.3) for _ in range(3)]
    wild = [scores(hard < gain) for gain in (-0.3, 0.3, 0.9)]
    base = scores(hard > 1)
    quiet, loud = (rank(base, {"m": runs}, range(200)).systems["m"] for runs in (calm, wild))
    assert loud.high - loud.low > 2 * (quiet.high - quiet.low)
    assert quiet.seed_share == 0 < 0.5 < loud.seed_share
    once = rank(base, {"m": calm[:1]}, range(200))
    assert not once.seeds_known and once.systems["m"].seed_share == 0


def test_a_method_that_ran_once_is_lent_the_others_spread():
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 1, 200)
    systems = {"wild": [scores(hard < gain) for gain in (-0.3, 0.3, 0.9)], "once": [scores(hard < 0.3)]}
    assert rank(scores(hard > 1), systems, range(200)).systems["once"].seed_share > 0.5


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(20), 10)
    values = scores(rng.integers(0, 2, 20)[groups])
    apart, together = (rank(values, {"m": [values]}, cl).systems["m"] for cl in (range(200), groups.tolist()))
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_identical_answers_tie():
    values = scores([1, 0, 1, 1, 0] * 10)
    found = rank(values, {"a": [values], "b": [values]}, range(50))
    assert all(one.tied for one in found.systems.values())
    assert found.systems["b"].to_best.p == 1 and not found.systems["a"].to_base.clear


def test_rows_that_one_run_leaves_unscored_are_left_out_for_all():
    whole, holed = scores([1, 0, 1, 1]), [Score(1.0), Score(None, "no"), Score(1.0), Score(0.0)]
    found = rank(whole, {"a": [whole], "b": [holed]}, range(4))
    assert found.n == 3 and found.systems["a"].value == 1.0
    with pytest.raises(UsageError):
        rank(whole, {"a": [[Score(None)] * 4]}, range(4))


def test_corpus_metrics_are_aggregated_not_averaged():
    bleu = registry.make("scorers", "bleu")
    golds = [
        "the cat sat on the old mat today",
        "a dog ran over the green hill",
        "rain fell on the roof all night long",
    ] * 8
    good = [bleu.score(gold, gold) for gold in golds]
    poor = [bleu.score(gold.replace("the", "some"), gold) for gold in golds]
    found = rank(poor, {"good": [good], "poor": [poor]}, range(24), aggregate=bleu.aggregate, draws=60)
    assert found.systems["good"].value == pytest.approx(1.0)
    assert found.systems["poor"].value == pytest.approx(bleu.aggregate(poor))
    assert not found.systems["poor"].tied


def test_lower_can_be_better():
    rng = np.random.default_rng(6)
    low, high = scores(rng.uniform(0, 0.3, 100)), scores(rng.uniform(0.5, 0.9, 100))
    found = rank(high, {"high": [high], "low": [low]}, range(100), higher_is_better=False)
    assert next(iter(found.systems)) == "low" and not found.systems["high"].tied


def texts(seed=0, count=12):
    rng = np.random.default_rng(seed)
    rows = [tuple(int(i) for i in rng.integers(0, 200, 20 + place)) for place in range(count)]
    return [Rendered(ids, (0.0, *(1.0,) * (len(ids) - 1)), 0, str(place)) for place, ids in enumerate(rows)]


def test_general_losses_are_those_of_the_plain_model():
    import torch

    model, rows = network("llama"), texts()
    found = forgetting.losses(model, rows)
    for row, value in zip(rows, found, strict=True):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=ids).loss) * (len(row.ids) - 1)
        assert value == pytest.approx(expected, rel=1e-4)


def test_forgetting_is_nothing_for_the_base_and_a_rise_for_a_broken_one():
    import torch

    base, rows = network("llama"), texts()
    before = forgetting.losses(base, rows)
    same = forgetting.rise(before, [before, before], rows)
    assert same["rise"] == same["low"] == same["high"] == 0
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.lm_head.weight.mul_(6)
    worse = forgetting.rise(before, [forgetting.losses(broken, rows)], rows)
    assert worse["low"] > 0 and worse["low"] <= worse["rise"] <= worse["high"]
    assert worse["tuned"] - worse["base"] == pytest.approx(worse["rise"])


def test_the_general_text_is_about_many_things():
    found = forgetting.paragraphs()
    assert len(found) == 40 and len({text.split()[0] + text.split()[1] for text in found}) == 40
    assert all(30 <= len(text.split()) <= 90 for text in found)


def test_speed_is_a_ratio_to_the_base():
    model, prompts = network("llama"), [[1, 2, 3, 4], [5, 6, 7, 8]]
    found = speed.against(model, model, prompts, rounds=3, tokens=4)
    assert found["low"] <= found["ratio"] <= found["high"] and found["tokens_per_second"] > 0


def row(label, value, *, tied=True, helps=True, size=1e6, merges=True, seconds=10.0, forgets=0.0, gap=None):
    """A judged method as the report has it."""
    return {
        "label": label, "status": "judged", "tied": tied, "score": {"value": value, "low": value - 0.03, "high": value + 0.03},
        "to_base": {"clear": helps, "difference": 0.2}, "to_best": gap, "adapter_bytes": size,
        "not_merged": "" if merges else "it is beside the weights", "run_seconds": seconds,
        "forgetting": {"low": forgets - 0.01, "share": forgets}, "learning_rate": 5e-4, "asked": {"name": label.split()[0]},
    }  # fmt: skip


def advice(*rows, provisional=()):
    return study_report.advise({"methods": rows, "base": {"value": 0.2}, "n": 100, "provisional": list(provisional)})


def test_a_tie_is_called_a_tie_and_the_cheapest_is_advised():
    told = advice(row("lora", 0.81, size=9e6), row("ia3", 0.8, size=2e5), row("prompt", 0.5, tied=False, size=1e3))
    assert told["take"] == "ia3"
    assert "lora (81.0 %) and ia3 (80.0 %) tie" in told["sentence"] and "smallest file" in told["sentence"]
    assert told["command"] == "luthier train TASK method=ia3 train.learning_rate=0.0005"


def test_a_winner_is_named_only_where_it_is_alone():
    behind = {"difference": -0.1, "low": -0.15, "high": -0.05}
    told = advice(row("full", 0.9), row("lora", 0.8, tied=False, gap=behind))
    assert told["take"] == "full" and "10.0 points behind (5.0 to 15.0)" in told["sentence"]
    assert "tie" not in told["sentence"]


def test_nothing_is_advised_where_nothing_beats_the_base():
    told = advice(row("lora", 0.25, helps=False), row("ia3", 0.24, helps=False))
    assert told["take"] is None and "base (20.0 %)" in told["sentence"]


def test_a_worse_one_of_a_tie_that_does_not_beat_the_base_is_not_advised():
    told = advice(row("lora", 0.5), row("ia3", 0.45, helps=False, size=10))
    assert told["take"] == "lora"


def test_a_ranking_without_search_or_seeds_is_labelled():
    told = advice(row("lora", 0.5), row("ia3", 0.45), provisional=["made on one seed"])
    assert "Provisional: made on one seed" in told["sentence"]
    once = rank(scores([1, 0, 1]), {"a": [scores([1, 1, 1])]}, range(3))
    assert len(study_report.provisional(1, once)) == 2
    twice = rank(scores([1, 0, 1]), {"a": [scores([1, 1, 1])] * 2}, range(3))
    assert not study_report.provisional(6, twice)


def test_asks_can_be_keys():
    assert {Ask(1e-3, 4): 1.0}[Ask(1e-3, 4)] == 1.0
