"""Packing: every row and every target is there once, laid out as a tree, within the budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.records import Pack, Rendered
from luthier.text.pack import WORTH_SHARING, plan, sharing

ids = st.integers(0, 3)  # few tokens: prefixes coincide often


@st.composite
def rows(draw):
    stems = draw(st.lists(st.lists(ids, min_size=0, max_size=60), min_size=1, max_size=3))
    count = draw(st.integers(1, 12))
    made = []
    for index in range(count):
        stem = draw(st.sampled_from(stems))
        tail = draw(st.lists(ids, min_size=2, max_size=8))
        weights = [0.0] * (len(stem) + 1) + [draw(st.sampled_from([0.0, 1.0, 0.5, -0.7])) for _ in tail[1:]]
        made.append(Rendered((*stem, *tail), tuple(weights), len(stem) + 1, str(index)))
    return made


def unpacked(pack: Pack) -> list[tuple[tuple[int, ...], tuple[tuple[int, int, float], ...]]]:
    """Rows as the tree holds them: the path's ids above each target, by walking parents."""
    segment = np.repeat(np.arange(len(pack.parents)), np.diff(pack.starts))

    def path(token: int) -> list[int]:
        here, last, out = int(segment[token]), token, []
        while here >= 0:
            out = [*pack.ids[pack.starts[here] : last + 1], *out]
            here = int(pack.parents[here])
            last = int(pack.starts[here + 1]) - 1 if here >= 0 else -1
        return [int(i) for i in out]

    found = []
    for row, name in enumerate(pack.rows):
        mine = np.flatnonzero(pack.target_row == row)
        targets = tuple(
            (tuple(path(int(pack.target_source[i]))), int(pack.target_ids[i]), round(float(pack.target_weights[i]), 5))
            for i in mine
        )
        found.append((name, targets))
    return found


def wanted(made: list[Rendered]) -> list:
    return sorted(
        (
            row.example_id,
            tuple((row.ids[:i], row.ids[i], round(w, 5)) for i, w in enumerate(row.weights) if w and i),
        )
        for row in made
        if any(row.weights[1:])
    )


@given(rows(), st.sampled_from([16, 70, 5000]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_pack_holds_exactly_its_rows(made, budget, share):
    packs = plan(made, budget=budget, share=share)
    assert sorted(row for pack in packs for row in unpacked(pack)) == wanted(made)
    for pack in packs:
        assert len(pack) <= budget or len(pack.rows) == 1
        assert (pack.positions[pack.starts[:-1]] == [
            0 if parent < 0 else pack.positions[pack.starts[parent + 1] - 1] + 1 for parent in pack.parents
        ]).all()  # fmt: skip
        for segment, parent in enumerate(pack.parents):
            assert parent < segment, "depth first: parents come before their children"
            if parent >= 0:
                assert pack.starts[segment + 1] <= pack.ends[parent], "a subtree is one slice"


def test_a_shared_instruction_is_laid_out_once():
    stem = tuple(range(100))
    made = [Rendered((*stem, 200 + i, 7, 8), (0.0,) * 101 + (1.0, 1.0), 101, str(i)) for i in range(10)]
    (pack,) = plan(made, budget=4096)
    assert len(pack) == 100 + 10 * 2  # the last token of a row predicts nothing and is not computed
    assert sharing([pack]).factor == 10 * 103 / 120
    (plain,) = plan(made, budget=4096, share=False)
    assert len(plain) == 10 * 102


def test_the_branch_point_predicts_one_token_per_branch():
    stem = tuple(range(50))
    made = [Rendered((*stem, 100 + i), (0.0,) * 50 + (1.0,), 50, str(i)) for i in range(5)]
    (pack,) = plan(made, budget=4096)
    assert len(pack) == 50
    assert set(pack.target_source) == {49}
    assert sorted(pack.target_ids) == [100, 101, 102, 103, 104]


def test_a_few_shared_tokens_are_not_worth_a_branch():
    made = [Rendered((1, 2, 3, 10 + i, 5), (0.0, 0.0, 0.0, 0.0, 1.0), 4, str(i)) for i in range(2)]
    assert WORTH_SHARING > 3
    (pack,) = plan(made, budget=64)
    assert len(pack) == 8


def test_no_rows_make_no_packs():
    assert plan([], budget=64) == []
    assert plan([Rendered((1, 2), (0.0, 0.0), 2, "nothing asked")], budget=64) == []
