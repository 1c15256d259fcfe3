"""Guesses of tokens: answers stay exactly the same, right guesses save passes, and guessing stops where it does not pay."""

from __future__ import annotations

import functools
import random

import pytest
from networks import KINDS, VOCABULARY, network

from luthier.model import decode, lookup, refill
from luthier.model.generate import generate
from luthier.model.lookup import Grams, Guess, Pace, guess

STOPS = frozenset(range(3, 8))


def repetitive(count=6, seed=0):
    """Prompts that say the same again and again, so that small random networks fall into loops too."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        phrase = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 4))]
        made.append([*[rng.randrange(VOCABULARY) for _ in range(rng.randrange(30))], *phrase * 6])
    return made


def answers(model, asked, **options):
    return generate(model, asked, decode=str, stop_ids=STOPS, max_new_tokens=24, **options)


@functools.cache
def plain(kind):
    return answers(network(kind), repetitive(), guess=False, batch_size=1)


@pytest.mark.parametrize("kind", (*KINDS, "mistral"))
@pytest.mark.parametrize("width", [None, 1, 5])
@pytest.mark.parametrize("together", [1, 4])
def test_guesses_change_nothing(kind, width, together, monkeypatch):
    if width is not None:  # whatever it costs
        monkeypatch.setattr(Pace, "width", lambda self, guesses: width)
    for found, expected in zip(answers(network(kind), repetitive(), batch_size=together), plain(kind), strict=True):
        assert (found.ids, found.stop) == (expected.ids, expected.stop)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize("right", [True, False])
def test_wrong_guesses_change_nothing_and_right_ones_save_passes(right, monkeypatch):
    """Guesses come from an oracle that knows the answer, or always says something else."""
    model, asked = network("llama"), repetitive(1)
    (expected,) = plain("llama")[:1]
    whole = [*asked[0], *expected.ids]
    passes, usual = [], decode.forward

    def told(recent, places, most):
        at = len(places[1].text)
        wanted = whole[at : at + most]
        return Guess(wanted if right else [(token + 1) % VOCABULARY for token in wanted], 4)

    monkeypatch.setattr(lookup, "guess", told)
    monkeypatch.setattr(
        refill.decode, "forward", lambda m, ids, *a, **k: passes.append(ids.shape) or usual(m, ids, *a, **k)
    )
    monkeypatch.setattr(Pace, "width", lambda self, guesses: lookup.MOST)
    (found,) = answers(model, asked)
    assert found.ids == expected.ids
    count = len(expected.ids) + (expected.stop == "end")
    assert (len(passes) <= 2 + count // 4) if right else (len(passes) == count)


def test_a_stop_among_the_guesses_ends_the_row():
    batch = refill.Batch.__new__(refill.Batch)
    batch.stop_ids, batch.pace = {5}, Pace()
    row = refill.Row(0, None, None, -1, guess=Guess([9, 5, 7], 4))
    assert batch._right(row, [9, 5, 7, 8]) == 2
    assert batch._right(row, [9, 6, 7, 8]) == 2
    assert batch._right(row, [8, 5, 7, 8]) == 1
    row.guess = Guess([9, 6], 4)
    assert batch._right(row, [9, 6, 8]) == 3


def test_grams_know_what_came_last():
    grams = Grams()
    for token in [1, 2, 3, 9, 1, 2, 4, 9, 1]:
        grams.extend([token])
    assert grams.after((1, 2), 3) == [4, 9, 1]
    assert grams.after((2, 3), 2) == [9, 1]
    assert guess([9, 1], [grams], 2) == Guess([2, 4], 2)  # what follows the last token is not known yet
    assert guess([3, 9, 1], [grams], 2) == Guess([2, 4], 3)  # the longer n-gram came once
    assert guess([7, 7], [grams], 2) == Guess()


def test_no_gram_reaches_over_a_seam():
    grams = Grams()
    grams.extend([1, 2, 3], apart=True)
    grams.extend([4, 5, 6], apart=True)
    assert grams.after((2, 3), 2) == []
    assert grams.after((3, 4), 2) == []
    assert grams.after((4, 5), 2) == [6]
    assert grams.after((1, 2), 1) == [3]


def test_the_first_place_that_knows_is_asked():
    own, earlier = Grams(), Grams()
    own.extend([1, 2, 7, 0])
    earlier.extend([1, 2, 8, 0, 6, 1, 2, 9])
    assert guess([1, 2], [own, earlier], 1) == Guess([7], 2)
    assert guess([6, 1, 2], [own, earlier], 1) == Guess([9], 3)  # a longer n-gram is surer


def test_guessing_pays_in_small_batches_and_stops_when_it_does_not():
    sure, fair, poor, four = Pace(), Pace(), Pace(), Guess([1] * 8, 4)
    for _ in range(60):
        sure.saw(four, 8)
        fair.saw(four, 2)
        poor.saw(four, 0)
    assert sure.width([four]) >= 6
    assert fair.width([four] * 32) < fair.width([four] * 4)
    assert poor.width([four] * 8) == 0
    assert [poor.width([four] * 8) for _ in range(2 * Pace.PATIENCE)].count(1) == 2  # it is tried again at times
    assert poor.width([Guess([1] * 8, 3)] * 8) > 0  # another kind of find is judged by itself
    assert sure.width([Guess()]) == 0


def test_draws_are_never_guessed():
    model = network("llama")
    batches, init = [], refill.Batch.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refill.Batch, "__init__", lambda self, *a, **k: batches.append(self) or init(self, *a, **k))
        answers(model, repetitive(2), temperature=1.0)
        answers(model, repetitive(2))
    assert [batch.pace is None for batch in batches] == [True, False]
