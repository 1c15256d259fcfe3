"""Splits that keep kin together, never move a row, and leave no leak."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.split import guard, split, without_leaks
from luthier.records import Example, Message, Origin

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ai", "ou")]


def word(generator: random.Random) -> str:
    return "".join(generator.choice(SYLLABLES) for _ in range(3))


def example(question: str, answer: str = "x", line: int = 0, roots: tuple[str, ...] = ()) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), Origin("rows.jsonl", line), roots=roots)


def rows(count: int, seed: int = 0) -> list[Example]:
    """Rows that have nothing to do with each other."""
    generator = random.Random(seed)
    return [example(" ".join(word(generator) for _ in range(8)), line=n + 1) for n in range(count)]


def near_to(row: Example, mark: str = "!") -> Example:
    return example(row.question + mark, line=9999)


def sides(found: object) -> dict[str, str]:
    return dict(found.as_dict()["sides"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [200, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_come_out_close_to_what_was_asked(count: int, seed: int) -> None:
    found = split(rows(count, seed=seed), dev=0.15, test=0.15, seed=seed)
    for side in (found.dev, found.test):
        assert abs(len(side) - 0.15 * count) <= 3 * (count * 0.15 * 0.85) ** 0.5
    assert len(found.train) + len(found.dev) + len(found.test) == count and not found.quarantined


def test_seeds_give_different_splits_and_one_seed_the_same() -> None:
    some = rows(100)
    assert sides(split(some, dev=0.2, test=0.2, seed=0)) == sides(split(some, dev=0.2, test=0.2, seed=0))
    assert sides(split(some, dev=0.2, test=0.2, seed=0)) != sides(split(some, dev=0.2, test=0.2, seed=1))


def test_no_share_no_rows() -> None:
    found = split(rows(50), dev=0, test=0, seed=0)
    assert len(found.train) == 50 and not found.dev and not found.test


def test_near_rows_lineage_and_reworded_answers_stay_together() -> None:
    some = rows(120)
    prose = "We repair shoes, bags and belts on weekdays from nine to five, and on Saturdays until noon."
    kin = [near_to(row) for row in some[:40]]
    children = [example(f"{word(random.Random(n))} child {n}", roots=(some[n].id,)) for n in range(40, 60)]
    twins = [example(f"{word(random.Random(n))} hours {n * 31}", answer=prose) for n in (1, 2)]
    others = [example(f"{word(random.Random(n))} other {n * 17}", answer=f"{prose} Shop {n * 13}.") for n in range(12)]
    found = split([*some, *kin, *children, *twins, *others], dev=0.25, test=0.25, seed=0)
    at = sides(found)
    assert all(at[row.id] == at[other.id] for row, other in zip(some[:40], kin, strict=True))
    assert all(at[child.id] == at[child.lineage[0]] for child in children)
    assert at[twins[0].id] == at[twins[1].id]
    assert len(set(at.values())) == 3


def test_stock_answers_and_labels_tie_nothing() -> None:
    stock = ["Please bring it in on a weekday between nine and five, and we will have a look at it for you."] * 2
    some = [example(row.question, answer=stock[n % 2] if n % 3 else "label") for n, row in enumerate(rows(90))]
    assert split(some, dev=0.2, test=0.2, seed=0).as_dict()["clusters"] == 90


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_rows_that_are_added_never_move_old_ones(seed: int, added: int) -> None:
    generator = random.Random(seed)
    old = rows(60, seed=seed)
    before = split(old, dev=0.2, test=0.2, seed=0)
    new = [near_to(generator.choice(old), mark) for mark in (" now", "?!") for _ in range(added // 4)]
    new += rows(added, seed=seed + 1)
    after = split([*old, *new], dev=0.2, test=0.2, seed=0)
    assert {row.id: sides(after)[row.id] for row in old} == sides(before)


def test_history_holds_even_when_rows_are_shuffled_and_put_in_front() -> None:
    old = rows(80)
    before = sides(split(old, dev=0.2, test=0.2, seed=0))
    new = [near_to(row) for row in old[::2]]
    mixed = [*new, *old[::-1]]
    after = sides(split(mixed, dev=0.2, test=0.2, seed=0, previous=before))
    assert {key: after[key] for key in before} == before
    assert all(after[row.id] == before[parent.id] for row, parent in zip(new, old[::2], strict=True))


def bridge() -> tuple[list[Example], Example, dict[str, str]]:
    """Two rows of different sides, and a row near both."""
    some = rows(30)
    before = sides(split(some, dev=0.3, test=0.3, seed=0))
    one = next(row for row in some if before[row.id] == "train")
    other = next(row for row in some if before[row.id] == "test")
    left, right = one.question, other.question
    long = " ".join([left] * 1 + [right])
    both = [example(f"{long} {left}", line=101), example(f"{long} {right}", line=102)]
    # two old rows that share most of their text with the new one
    given = {**before, both[0].id: "train", both[1].id: "test"}
    return [*some, *both], example(long, line=103), given


def test_a_row_between_two_sides_is_quarantined_and_listed() -> None:
    old, between, before = bridge()
    found = split([*old, between], dev=0.3, test=0.3, seed=0, previous=before)
    assert {key: sides(found)[key] for key in before} == before
    assert found.quarantined == [between]
    assert found.as_dict()["quarantined"] == ["rows.jsonl:103"] and sides(found)[between.id] == "quarantined"


def test_a_quarantined_row_stays_so_and_does_not_spread() -> None:
    old, between, before = bridge()
    first = split([*old, between], dev=0.3, test=0.3, seed=0, previous=before)
    follower = near_to(old[0])
    second = split([*old, between, follower], dev=0.3, test=0.3, seed=0, previous=sides(first))
    assert second.quarantined == [between]
    assert sides(second)[follower.id] == before[old[0].id]


def test_a_chain_between_two_sides_is_cut_where_they_meet() -> None:
    words = [word(random.Random(n)) for n in range(30)]
    chain = [example(" ".join(words[n : n + 10]), line=n) for n in range(9)]  # near up to two steps away
    before = {chain[0].id: "train", chain[-1].id: "test"}
    found = split(chain, dev=0.2, test=0.2, seed=0, previous=before)
    assert [sides(found)[row.id] for row in (chain[0], chain[1], chain[-1])] == ["train", "train", "test"]
    assert len(found.quarantined) == 2
    assert guard(found.train, found.dev, found.test) == []


def test_the_record_is_json_and_feeds_the_next_split() -> None:
    some = rows(40)
    record = json.loads(json.dumps(split(some, dev=0.2, test=0.2, seed=0).as_dict()))
    again = split(some, dev=0.2, test=0.2, seed=99, previous=record["sides"])
    assert again.as_dict()["sides"] == record["sides"]


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_a_split_of_ours_has_no_leak(seed: int) -> None:
    generator = random.Random(seed)
    some = rows(50, seed)
    kin = []
    for row in some:
        words = row.question.split()
        words[generator.randrange(8)] = word(generator)
        kin.append(example(" ".join(words + [word(generator)] * generator.randint(0, 6))))
    found = split([*some, *kin], dev=0.2, test=0.2, seed=seed)
    assert guard(found.train, found.dev, found.test) == []


# ---- leaks between files -------------------------------------------------------------------------------------------
def test_every_kind_of_leak_is_found_and_taken_from_train_only() -> None:
    clean = [example(row.question, answer=f"{row.question} {row.question}") for row in rows(40, seed=1)]
    held = rows(6, seed=2)
    text = "in the year of the great flood the miller of the lower town built a bridge of oak and iron over it"
    prose = "The bridge was built in 1720 by the miller of the lower town, of oak and of iron that he had saved."
    test = [
        *held[:3],
        example(f"{text}, but why and for whom did he do it, and who paid for all of the nails? {held[4].question}"),
        example("Who built it?", answer=prose),
        example("a short question about nine little words of oak"),
    ]
    leaks = {
        "same": example(f"  {held[0].question.upper()} "),
        "near": near_to(held[1], " ok"),
        "run": example(f"{held[3].question} {held[5].question} and so {text} {clean[0].question}"),
        "answer": example("By whom was that thing over the river made?", answer=prose),
        "covered": example(f"{clean[1].question} short question about nine little words of oak {clean[2].question}"),
    }
    train = [*clean, *leaks.values()]
    found = guard(train, [], test)
    assert {leak.kind: leak.row for leak in found} == leaks
    assert {leak.side for leak in found} == {"test"}
    assert without_leaks(train, found) == clean
    assert all("test row rows.jsonl" in str(leak) for leak in found)


def test_test_rows_are_named_before_dev_rows() -> None:
    row = rows(1)[0]
    (leak,) = guard([row], [row], [row])
    assert (leak.side, leak.kind) == ("test", "same")


def test_nothing_held_out_nothing_leaks() -> None:
    assert guard(rows(5), [], []) == [] and guard([], rows(5), rows(5)) == []
