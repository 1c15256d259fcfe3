"""Feeds: every row once an epoch, a position that fits in JSON, the same batches after it is restored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.stream import Stream
from luthier.records import Example, Rendered
from luthier.training.feed import ShuffledFeed, StreamFeed


def make(
    count: int, batch_size: int, *, epochs: float = 2, max_steps: int | None = None, seed: int = 0
) -> ShuffledFeed:
    return ShuffledFeed(
        toy.rows(count), batch_size=batch_size, seed=seed, epochs=epochs, max_steps=max_steps, budget=64
    )


def names(batch: Any) -> list[str]:
    return sorted(row for one in batch.packs for row in one.rows)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 3))
def test_each_epoch_shows_each_row_once(count: int, batch_size: int, epochs: int) -> None:
    feed = make(count, batch_size, epochs=epochs)
    batches = list(feed)
    assert len(batches) == feed.total_steps == epochs * feed.steps_per_epoch
    assert sum(batch.examples for batch in batches) == epochs * count
    for epoch in range(epochs):
        part = batches[epoch * feed.steps_per_epoch : (epoch + 1) * feed.steps_per_epoch]
        assert sorted(name for batch in part for name in names(batch)) == sorted(f"row{i}" for i in range(count))
        assert part[-1].epoch == pytest.approx(epoch + 1)


def test_epochs_and_seeds_differ() -> None:
    feed = make(20, 5)
    assert feed.order(0) != feed.order(1) != make(20, 5, seed=1).order(1)
    assert feed.order(0) == make(20, 7).order(0)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 5), st.integers(0, 9))
def test_an_order_is_what_numpy_draws_from_seed_and_epoch(count: int, batch_size: int, seed: int, epoch: int) -> None:
    """Checkpoints of earlier versions go on with the rows that they would have seen."""
    feed = make(count, batch_size, seed=seed)
    expected = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    assert feed.order(epoch) == expected
    first = feed.batch(epoch * feed.steps_per_epoch)
    assert names(first) == sorted(f"row{index}" for index in expected[:batch_size])


def test_an_order_is_drawn_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, plain = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or plain(seed))
    list(make(40, 3, epochs=3))
    assert drawn == [[0, 0], [0, 1], [0, 2]]


class Numbered(Sequence[Rendered]):
    """Rows that say which of them were asked for."""

    def __init__(self, count: int) -> None:
        self.rows, self.asked = toy.rows(count), list[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return self.rows[index]


@pytest.mark.parametrize("count", [40, 400])
def test_a_step_and_a_resumed_step_ask_for_their_own_rows_only(count: int) -> None:
    rows = Numbered(count)
    feed = ShuffledFeed(rows, batch_size=8, seed=0, epochs=1, budget=512)
    next(feed)
    state, order = feed.state(), feed.order(0)
    rows.asked.clear()
    next(feed)
    assert rows.asked == order[8:16]
    rows.asked.clear()
    again = ShuffledFeed(rows, batch_size=8, seed=0, epochs=1, budget=512)
    again.restore(state)
    next(again)
    assert rows.asked == [0, *order[8:16]], "one row more to see that something is learnt"


def test_parts_of_an_epoch_and_max_steps() -> None:
    assert make(20, 5, epochs=0.5).total_steps == 2
    assert make(20, 5, epochs=0.01).total_steps == 1
    assert make(20, 5, epochs=1.3).total_steps == 6
    assert len(list(make(20, 5, epochs=9, max_steps=3))) == 3


def test_a_restored_feed_goes_on_where_it_was() -> None:
    whole = [names(batch) for batch in make(20, 6)]
    feed = make(20, 6)
    for _ in range(3):
        next(feed)
    state = json.loads(json.dumps(feed.state()))
    other = make(20, 6)
    other.restore(state)
    assert [names(batch) for batch in other] == whole[3:]


def test_branches_of_one_example_stay_in_one_step() -> None:
    singles = toy.rows(12)
    pairs = [singles[i : i + 2] for i in range(0, 12, 2)]
    feed = ShuffledFeed(pairs, batch_size=2, seed=0, epochs=1, budget=64)
    for batch in feed:
        numbers = {int(name.removeprefix("row")) // 2 for name in names(batch)}
        assert batch.examples == 2 == len(numbers) and len(names(batch)) == 4


def lines(folder: Path, count: int = 7) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "completion": str(i)}) + "\n" for i in range(count)))
    return path


def render(example: Example) -> Rendered:
    return Rendered((1, 2, 3 + int(example.answer)), (0.0, 0.0, 1.0), 2, example.answer)


def stream(path: Path) -> StreamFeed:
    return StreamFeed(Stream([path], buffer=3, seed=1), render, batch_size=3, max_steps=6, budget=64)


def test_a_stream_goes_round_until_max_steps(tmp_path: Path) -> None:
    batches = list(stream(lines(tmp_path)))
    shown = [name for batch in batches for name in names(batch)]
    assert len(batches) == 6 and len(shown) == 18
    assert all(2 <= shown.count(str(row)) <= 3 for row in range(7))
    assert [batch.epoch for batch in batches] == sorted(batch.epoch for batch in batches)
    assert batches[-1].epoch >= 2


@pytest.mark.parametrize("at", range(6))
def test_a_restored_stream_goes_on_where_it_was(tmp_path: Path, at: int) -> None:
    path = lines(tmp_path)
    whole = [names(batch) for batch in stream(path)]
    feed = stream(path)
    for _ in range(at):
        next(feed)
    other = stream(path)
    other.restore(json.loads(json.dumps(feed.state())))
    assert [names(batch) for batch in other] == whole[at:]
