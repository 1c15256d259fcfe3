"""Forgetting: has the loss on general English that has nothing to do with the task risen?

The text is our own (`general.txt`): forty short paragraphs on as many subjects. A tuned model that reads them worse
than its base has paid for the task with something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.evaluate import resample
from luthier.records import Rendered

BUDGET = 2048  # tokens read together
DRAWS = 4000
Losses = NDArray[np.float64]  # (paragraphs,) summed nats


@cache
def paragraphs() -> tuple[str, ...]:
    """The general text, one paragraph each."""
    text = resources.files("luthier.evaluate").joinpath("general.txt").read_text("utf-8")
    return tuple(part.strip() for part in text.split("\n\n") if part.strip())


def rows(tokenizer: Any) -> list[Rendered]:
    """The paragraphs as ids; every token but the first is predicted."""
    encoded = [tokenizer.encode(tokenizer.start + text) for text in paragraphs()]
    return [
        Rendered(tuple(ids), (0.0, *(1.0,) * (len(ids) - 1)), 0, str(index)) for index, ids in enumerate(encoded)
    ]  # fmt: skip


def losses(model: Any, texts: Sequence[Rendered], *, share: bool = True) -> Losses:
    """Summed loss of each paragraph, in nats."""
    import torch

    from luthier.model.batch import Batch
    from luthier.model.logprob import logprobs
    from luthier.text import pack

    place = {row.example_id: index for index, row in enumerate(texts)}
    sums = np.zeros(len(texts))
    for one in pack.plan(texts, budget=BUDGET, share=share):
        batch = Batch.of(one, model.device)
        with torch.no_grad():
            found = -logprobs(model, batch).double().cpu().numpy()
        np.add.at(sums, [place[one.rows[row]] for row in one.target_row], found)
    return sums


def rise(base: Losses, tuned: Sequence[Losses], texts: Sequence[Rendered], *, seed: int = 0) -> dict[str, float]:
    """Mean loss per token of base and tuned model (several seeds: their mean), and the rise with a paired interval."""
    sizes = np.array([row.supervised for row in texts], dtype=float)
    after = np.mean(tuned, axis=0)
    sums = np.stack([base, after, after - base], axis=1)  # (paragraphs, 3)
    points = sums.sum(0) / sizes.sum()
    drawn = resample.means(sums, sizes, np.random.default_rng(seed), DRAWS)
    low, high = resample.interval(drawn, points, len(sizes))
    return {
        "base": float(points[0]),
        "tuned": float(points[1]),
        "rise": float(points[2]),
        "low": float(low[2]),
        "high": float(high[2]),
        "share": float(points[2] / points[0]),
    }
