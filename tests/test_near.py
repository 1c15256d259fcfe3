"""Near duplicates: what MinHash finds is what comparing every pair finds."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data import near, runs

SENTENCE = "where is my order the blue shoes tomorrow morning please refund broken zip bag a new pair of at noon"
WORDS = SENTENCE.split()


def sentence(generator: random.Random, length: int = 12) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(length))


def varied(generator: random.Random, text: str) -> str:
    """The text with a word or two changed."""
    words = text.split()
    for _ in range(generator.randint(0, 2)):
        words[generator.randrange(len(words))] = generator.choice(WORDS)
    return " ".join(words)


def by_hand(texts: list[str], threshold: float) -> list[int]:
    """Clusters from all pairs of plain Python sets."""
    forest = near.Forest(len(texts))
    sets = [grams(near.normal(text)) for text in texts]
    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j]):
                forest.join(i, j)
    return [forest.root(i) for i in range(len(texts))]


def grams(text: str) -> set[str]:
    found = set()
    for place, character in enumerate(text):
        width = 2 if "぀" <= character <= "鿿" else 5
        if place + width <= len(text):
            found.add(text[place : place + width])
    return found or {text}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_clusters_are_those_of_all_pairs(threshold: float) -> None:
    generator = random.Random(7)
    seeds = [sentence(generator) for _ in range(60)]
    texts = [varied(generator, generator.choice(seeds)) for _ in range(400)]
    assert near.clusters(texts, threshold) == by_hand(texts, threshold)


def test_chinese_is_compared_by_character_pairs() -> None:
    texts = [
        "高血压患者可以吃党参吗？",
        "高血压患者可以吃党参吗",
        "高血压患者能不能吃人参",
        "心脏病人怎样锻炼身体",
        "ｏｋ",
        "OK",
    ]
    assert near.clusters(texts) == by_hand(texts, near.THRESHOLD) == [0, 0, 2, 3, 4, 4]


@given(st.lists(st.text(alphabet="abc 高血", max_size=12), max_size=12))
@settings(max_examples=100, deadline=None)
def test_short_and_odd_texts_agree_with_all_pairs(texts: list[str]) -> None:
    assert near.clusters(texts) == by_hand(texts, near.THRESHOLD)


def test_ngrams_are_those_of_each_text_alone() -> None:
    texts = ["", "a", "abcd", "abcde", "高", "高血压abcdefg", "abc" * 9]
    together = near.ngrams(texts)
    for text, found in zip(texts, together, strict=True):
        assert np.array_equal(found, near.ngrams([text])[0])
        assert len(found) == len(grams(text)) if text else not len(found)


def test_pairs_cross_the_two_lists_and_carry_their_similarity() -> None:
    left = ["please send the blue shoes to my house tomorrow", "something else entirely here"]
    right = ["what time is it", "please send the blue shoes to my house tomorrow!", left[1]]
    found = near.pairs(left, right, 0.8)
    assert [(pair.left, pair.right) for pair in found] == [(1, 2), (0, 1)]
    assert found[0].similarity == 1 and 0.9 < found[1].similarity < 1


def test_a_shared_instruction_does_not_make_rows_near() -> None:
    generator = random.Random(1)
    head = "You are the clerk of a repair shop. Turn the message into JSON with six fields and no more. Message: " * 3
    tail = "\n\nAnswer in JSON, without any comment:"
    plain = [sentence(generator, 8) for _ in range(200)]
    wrapped = [f"{head}{text}{tail}" for text in plain]
    assert near.shared_affixes(wrapped)[0].startswith("You are the clerk")
    assert near.clusters(near.without_shared(wrapped)) == near.clusters(plain)
    assert len(set(near.clusters(wrapped))) == 1
    assert near.without_shared(plain) == plain


def test_repeated_texts_are_not_taken_for_an_instruction() -> None:
    texts = ["the very same long text in many rows"] * 90 + [f"{n} something of its own {n}" for n in range(10)]
    assert near.without_shared(texts) == texts


def look_alikes(count: int) -> list[str]:
    """Rows of a few patterns with a few slots each."""
    generator = random.Random(3)
    patterns = [
        "please turn on the {} in the {} at {}",
        "is the {} of the {} still running at {}",
        "dim the {} near {} by {}",
    ]
    return [
        generator.choice(patterns).format(
            generator.choice(["light", "heating", "radio"]),
            generator.choice(["hall", "office"]),
            generator.randrange(999),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("threshold", [0.7, 0.8])
@pytest.mark.parametrize("at_a_time", [1, 50, 1 << 17])
def test_candidates_are_all_pairs_with_a_band_and_an_estimate(
    threshold: float, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams = near.ngrams(look_alikes(150))
    signatures, rows = near._signatures(grams), near._rows_per_band(threshold)
    expected = set()
    for a in range(150):
        for b in range(a + 1, 150):
            same = signatures[a] == signatures[b]
            banded = any(same[i : i + rows].all() for i in range(0, 128 // rows * rows, rows))
            if banded and same.sum() >= (threshold - near.SLACK) * 128:
                expected.add((a, b))
    monkeypatch.setattr(near, "_PAIRS", at_a_time)
    assert sorted(near._candidates(grams, threshold, np.arange(150))) == sorted(expected)
    sides = np.arange(150) < 40
    crossing = {(a, b) for a, b in expected if sides[a] != sides[b]}
    assert set(near._candidates(grams, threshold, sides)) == crossing and expected > crossing > set()


def test_one_large_family_is_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is near every other: 125,000 pairs, and a chain that joins them needs 499."""
    compared, plain = [], near.jaccard
    monkeypatch.setattr(near, "jaccard", lambda a, b: compared.append(1) or plain(a, b))
    head = "the quick brown fox jumps over the lazy dog while the cat sleeps on the sill of house number"
    assert set(near.clusters([f"{head} {number}" for number in range(500)])) == {0}
    assert len(compared) < 3 * 500


def test_ten_thousand_short_rows_take_seconds() -> None:
    generator = random.Random(3)
    seeds = [sentence(generator) for _ in range(5000)]
    texts = seeds + [varied(generator, text) for text in seeds]
    before = time.process_time()
    labels = near.clusters(near.without_shared(texts))
    assert time.process_time() - before < 15
    assert len(set(labels)) < 9000


def test_a_copied_run_of_words_is_found_and_quoted() -> None:
    passage = "in the year of the great flood the miller of the lower town built a bridge of oak and iron"
    texts = [f"Tell me more. {passage}, they say.", "no relation at all to anything here", f"Once, {passage} and left."]
    found = runs.shared(texts)
    both = found.long[0].keys() & found.long[2].keys()
    assert both and not found.long[1]
    assert all(found.quote(0, run) in near.normal(texts[0]) for run in both)
    assert {(cover.outer, cover.inner) for cover in found.covers} >= {(0, 2), (2, 0)}


def test_a_run_that_everyone_shares_is_wording_not_a_copy() -> None:
    wording = "please read the following message from a customer and say in one word what it is about"
    texts = [f"number {n} {wording} {n * 7919}" for n in range(100)]
    assert not any(runs.shared(texts).long)
