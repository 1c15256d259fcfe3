"""Paired statistics: against hand-computed cases, against libraries, and against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from luthier import registry
from luthier.errors import UsageError
from luthier.evaluate import compare, resample
from luthier.evaluate.predict import clusters_of
from luthier.records import Prediction, Score

SIMULATIONS = 2000
NOISE = 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)  # three standard errors of a true 5 %


def scores(values):
    return [Score(None if value is None else float(value)) for value in values]


def run(base, tuned, *, binary=False, clusters=None, draws=2000, seed=0, **more):
    clusters = range(len(base)) if clusters is None else clusters
    return compare.paired(scores(base), scores(tuned), list(clusters), binary=binary, seed=seed, draws=draws, **more)


def table(kept, broken, fixed, stuck):
    return [1] * kept + [1] * broken + [0] * fixed + [0] * stuck, [1] * kept + [0] * broken + [1] * fixed + [0] * stuck


# ---- known answers --------------------------------------------------------------------------------------------------


def test_mid_p_by_hand():
    # b = 2, c = 8: 2 P(X <= 2) - P(X = 2) for X ~ Bin(10, 1/2) = (2 * 56 - 45) / 1024
    assert compare.mcnemar_mid_p(2, 8) == pytest.approx(67 / 1024)
    assert compare.mcnemar_mid_p(0, 0) == 1
    assert compare.mcnemar_mid_p(1, 1) == pytest.approx(1 - 0.5 / 2)
    assert compare.mcnemar_mid_p(0, 5) == pytest.approx(1 / 32)
    assert compare.mcnemar_mid_p(8, 2) == compare.mcnemar_mid_p(2, 8)


@pytest.mark.parametrize(("broken", "fixed"), [(3, 9), (10, 31), (7, 6), (0, 4)])
def test_mid_p_is_the_exact_test_less_half_a_point(broken, fixed):
    exact = stats.binomtest(min(broken, fixed), broken + fixed).pvalue
    assert compare.mcnemar_mid_p(broken, fixed) == pytest.approx(exact - stats.binom.pmf(broken, broken + fixed, 0.5))
    library = pytest.importorskip("statsmodels.stats.contingency_tables")
    assert library.mcnemar([[5, broken], [fixed, 5]], exact=True).pvalue == pytest.approx(exact)


def test_agresti_min_by_hand():
    # n = 100, b = 4, c = 14 -> b' = 4.5, c' = 14.5, n' = 102
    low, high = compare.agresti_min(4, 14, 100)
    delta, se = 10 / 102, math.sqrt(19 - 100 / 102) / 102
    assert (low, high) == (pytest.approx(delta - 1.959964 * se), pytest.approx(delta + 1.959964 * se))


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 17), (85, 170)])
def test_wilson_agrees_with_scipy(right, n):
    wanted = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert compare.wilson(right, n) == (pytest.approx(wanted.low, abs=1e-12), pytest.approx(wanted.high, abs=1e-12))


@settings(max_examples=50, deadline=None)
@given(p=st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_agrees_with_statsmodels(p):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    adjusted = compare.holm(p)
    assert list(adjusted) == list(p)
    assert list(adjusted.values()) == pytest.approx(list(multitest.multipletests(list(p.values()), method="holm")[1]))


def test_sign_flip_by_hand_and_by_scipy():
    assert resample.sign_flip(np.array([1.0, 2.0, 3.0]), np.random.default_rng(0), 10) == pytest.approx(2 / 8)
    rng = np.random.default_rng(4)
    sample = rng.normal(0.25, 1, 60)
    wanted = stats.permutation_test((sample,), np.mean, permutation_type="samples", n_resamples=20_000, rng=5).pvalue
    assert resample.sign_flip(sample, rng, 20_000) == pytest.approx(wanted, abs=0.015)


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(5)
    d = rng.beta(2, 5, 150) - 0.2
    drawn = resample.means(d[:, None], np.ones(150), rng, 20_000)
    wanted = stats.bootstrap((d,), np.mean, method="percentile", n_resamples=20_000, rng=rng).confidence_interval
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx([wanted.low, wanted.high], abs=0.0015)


@pytest.mark.parametrize("draws", [1, 999])
def test_draws_come_in_full_however_they_are_chunked(draws, monkeypatch):
    monkeypatch.setattr(resample, "CHUNK", 500)
    assert resample.means(np.ones((7, 2)), np.ones(7), np.random.default_rng(0), draws).shape == (draws, 2)


def test_detectable_gain_matches_the_reference_table():
    for n, disagree, points in [(100, 0.1, 8.9), (200, 0.2, 8.9), (500, 0.3, 6.9), (1000, 0.1, 2.8)]:
        half = round(n * disagree / 2)
        base, tuned = table(n // 4, half, half, n - n // 4 - 2 * half)
        assert 100 * run(base, tuned, binary=True).smallest_detectable_gain == pytest.approx(points, rel=0.05)


# ---- paired ---------------------------------------------------------------------------------------------------------


def test_binary_items_take_the_exact_test():
    found = run(*table(20, 3, 60, 17), binary=True, metric="exact")
    assert (found.metric, found.n, found.base, found.tuned) == ("exact", 100, 0.23, 0.8)
    assert found.difference == pytest.approx(0.57)
    assert found.p_value == pytest.approx(float(compare.mcnemar_mid_p(3, 60)))
    assert (found.low, found.high) == pytest.approx(compare.agresti_min(3, 60, 100))
    assert found.base_interval == pytest.approx(compare.wilson(23, 100))
    assert found.p_better > 0.999 and found.verdict == "better" and "McNemar" in found.method


def test_swapping_the_systems_mirrors_everything():
    rng = np.random.default_rng(0)
    base, tuned = rng.random(80), rng.random(80) * 0.6
    one, other = run(base, tuned), run(tuned, base)
    assert one.verdict == "worse" and other.verdict == "better"
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))
    assert one.p_better == pytest.approx(1 - other.p_better)
    lower = run(base, tuned, higher_is_better=False)
    assert lower.verdict == "better" and lower.p_better == pytest.approx(1 - one.p_better)


def test_the_same_seed_gives_the_same_numbers():
    rng = np.random.default_rng(2)
    base, tuned = rng.random(60), rng.random(60)
    assert run(base, tuned, seed=3) == run(base, tuned, seed=3)
    assert run(base, tuned, seed=3) != run(base, tuned, seed=4)


def test_names_of_clusters_do_not_matter():
    rng = np.random.default_rng(2)
    base, tuned, groups = rng.random(60), rng.random(60), rng.integers(0, 25, 60)
    assert run(base, tuned, clusters=groups) == run(base, tuned, clusters=[f"root-{g}" for g in groups])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5, 30, 170, 2000])
def test_the_same_answers_twice_are_never_better(n, binary):
    values = np.random.default_rng(n).integers(0, 2, n) if binary else np.random.default_rng(n).random(n)
    found = run(values, values, binary=binary)
    assert found.verdict in ("same", "cannot tell") and found.p_value == 1
    assert found.low < 0 < found.high
    assert found.verdict == ("same" if n >= 170 else "cannot tell")


def test_unscored_items_leave_the_rate_and_are_counted():
    found = run([1, None, 0, 1, None], [1, 1, 1, None, None], binary=True)
    assert (found.n, found.unscored, found.base, found.tuned) == (2, 3, 0.5, 1.0)
    with pytest.raises(UsageError, match="no item"):
        run([None], [1])


def test_few_clusters_are_said_and_widen_the_interval():
    rng = np.random.default_rng(3)
    d = rng.normal(0.1, 0.2, 12).clip(-1, 1)
    found = run(np.zeros(12), d)
    naive = np.quantile(resample.means(d[:, None], np.ones(12), np.random.default_rng(0), 4000), [0.025, 0.975])
    assert found.high - found.low > 1.1 * (naive[1] - naive[0])
    assert "12 independent groups" in found.note and "Student" in found.note
    assert not run(rng.random(60), rng.random(60)).note


def test_clusters_widen_the_interval_of_binary_items():
    base, tuned = np.zeros(200), np.repeat(np.random.default_rng(1).integers(0, 2, 20), 10)
    apart, together = run(base, tuned, binary=True), run(base, tuned, binary=True, clusters=np.repeat(range(20), 10))
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert "20 clusters" in together.method and "McNemar" in apart.method
    assert together.smallest_detectable_gain > 2.5 * apart.smallest_detectable_gain


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 0.5, 1]), st.sampled_from([0, 0.5, 1]), st.integers(0, 9)),
        min_size=1,
        max_size=40,
    )
)
def test_any_result_is_coherent(rows):
    base, tuned, groups = zip(*rows, strict=True)
    found = run(base, tuned, clusters=groups, draws=200)
    assert -1 <= found.low <= found.difference + 1e-9 and found.difference - 1e-9 <= found.high <= 1
    for value, (low, high) in ((found.base, found.base_interval), (found.tuned, found.tuned_interval)):
        assert 0 <= low <= value + 1e-9 and value - 1e-9 <= high <= 1
    assert 0 < found.p_value <= 1 and 0 <= found.p_better <= 1 and 0 < found.smallest_detectable_gain <= 1
    assert (found.verdict == "better") == (found.low > 0) and (found.verdict == "worse") == (found.high < 0)
    assert found.verdict not in ("better", "worse") or found.p_value <= 0.05
    assert (found.needed is not None) <= (found.verdict == "cannot tell")


def test_needed_items_are_enough():
    rng = np.random.default_rng(0)
    base, tuned = rng.random(100), np.clip(rng.random(100) + 0.04, 0, 1)
    found = run(base, tuned)
    assert found.verdict == "cannot tell" and found.needed
    times = math.ceil((100 + found.needed) / 100)
    assert run(np.tile(base, times), np.tile(tuned, times)).verdict != "cannot tell"


def test_corpus_metrics_are_aggregated_anew_in_every_draw():
    bleu = registry.make("scorers", "bleu")
    gold = [
        f"the {w} was brought to the shop on day {i} with a broken part"
        for i, w in enumerate(["bike", "phone", "bag"] * 12)
    ]
    weak = [text.replace("broken part", "thing").replace("shop", "house") for text in gold]
    base, tuned = ([bleu.score(a, g) for a, g in zip(side, gold, strict=True)] for side in (weak, gold))
    found = compare.paired(base, tuned, range(36), binary=False, seed=0, draws=400, aggregate=bleu.aggregate)
    assert found.base == pytest.approx(bleu.aggregate(base)) and found.tuned == pytest.approx(1)
    assert found.verdict == "better" and found.p_value < 0.01 and found.low < found.difference < found.high
    again = compare.paired(base, base, range(36), binary=False, seed=0, draws=400, aggregate=bleu.aggregate)
    assert again.verdict in ("same", "cannot tell") and again.p_value == 1


def test_corpus_bootstrap_agrees_with_sacrebleu():
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(30)]
    gold = [" ".join(rng.choice(vocabulary, 12)) for _ in range(60)]
    sides = [[" ".join(w if rng.random() < p else "x" for w in text.split()) for text in gold] for p in (0.80, 0.84)]
    bleu = registry.make("scorers", "bleu")
    base, tuned = ([bleu.score(a, g) for a, g in zip(side, gold, strict=True)] for side in sides)
    found = compare.paired(base, tuned, range(60), binary=False, seed=0, draws=1000, aggregate=bleu.aggregate)
    named = [("base", sides[0]), ("tuned", sides[1])]
    told = PairedTest(named, {"BLEU": BLEU(references=[gold])}, [gold], test_type="ar", n_samples=2000)()[1]["BLEU"]
    assert found.p_value == pytest.approx(told[1].p_value, abs=0.05)
    assert 100 * found.base == pytest.approx(told[0].score)


# ---- simulated truth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "rate"), [(50, 0.5), (170, 0.8), (400, 0.2)])
def test_false_alarms_of_the_exact_test(n, rate):
    rng = np.random.default_rng(n)
    base, tuned = (rng.random((2, SIMULATIONS, n)) < rate).astype(int)
    broken, fixed = ((base > tuned).sum(1), (tuned > base).sum(1))
    low, high = compare.agresti_min(broken, fixed, n)
    assert (compare.mcnemar_mid_p(broken, fixed) <= 0.05).mean() <= 0.05 + NOISE
    assert ((low > 0) | (high < 0)).mean() <= 0.05 + NOISE


def bootstrap(d, clusters=None):
    """Intervals and p-values of many simulations at once: d (n, simulations)."""
    groups = np.arange(len(d)) if clusters is None else clusters
    sums, sizes = resample.by_group(d, groups), np.bincount(groups).astype(float)
    drawn = resample.means(sums, sizes, np.random.default_rng(0), 1000)
    low, high = resample.interval(drawn, d.mean(0), len(sizes))
    return low, high, resample.sign_flips(sums, np.random.default_rng(1), 1000)


@pytest.mark.parametrize("n", [20, 60, 200])
def test_false_alarms_and_coverage_of_the_bootstrap(n):
    rng = np.random.default_rng(n)
    shares = rng.binomial(6, 0.7, (2, n, SIMULATIONS)) / 6
    low, high, p = bootstrap(shares[1] - shares[0])
    assert ((low > 0) | (high < 0)).mean() <= 0.05 + NOISE
    assert (((low > 0) | (high < 0)) & (p <= 0.05)).mean() <= 0.05 + NOISE / 2
    base, tuned = rng.binomial(6, 0.15, (n, SIMULATIONS)) / 6, rng.binomial(6, 0.82, (n, SIMULATIONS)) / 6
    low, high, p = bootstrap(tuned - base)
    assert ((low <= 0.67) & (high >= 0.67)).mean() >= 0.95 - NOISE - 0.005
    assert (p <= 0.05).mean() > 0.99


def test_false_alarms_with_clusters():
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(50), 10)
    d = rng.normal(0, 0.3, (50, SIMULATIONS))[groups] + rng.normal(0, 0.2, (500, SIMULATIONS))
    low, high, p = bootstrap(d, groups)
    assert (p <= 0.05).mean() <= 0.05 + NOISE
    assert ((low > 0) | (high < 0)).mean() <= 0.05 + NOISE + 0.01
    low, high, _ = bootstrap(d)  # clusters ignored: the test must be able to fail
    assert ((low > 0) | (high < 0)).mean() > 0.3


def test_power_at_the_smallest_detectable_gain():
    rng = np.random.default_rng(9)
    n, disagree = 300, 0.2
    gain = compare.POWER * math.sqrt(disagree / n)
    cells = rng.multinomial(n, [(disagree - gain) / 2, (disagree + gain) / 2, 1 - disagree], SIMULATIONS)
    assert (compare.mcnemar_mid_p(cells[:, 0], cells[:, 1]) <= 0.05).mean() == pytest.approx(0.8, abs=0.05)


# ---- clusters -------------------------------------------------------------------------------------------------------


def test_items_with_a_common_root_form_a_cluster():
    lineages = [("a",), ("b",), ("a", "c"), ("c",), (), ("d", "b"), ("e",)]
    rows = [Prediction(f"id{i}", "", "", "", "end", "", lineage) for i, lineage in enumerate(lineages)]
    names = clusters_of(rows)
    assert names[0] == names[2] == names[3] and names[1] == names[5]
    assert len({names[0], names[1], names[4], names[6]}) == 4
