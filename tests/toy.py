"""A model of a few hundred numbers behind the training loop's contracts: fast enough to train hundreds of times."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from luthier.contracts import Adapted
from luthier.records import Loss, Pack, Rendered
from luthier.spec import TrainSpec
from luthier.training.feed import ShuffledFeed
from luthier.training.loop import Training

torch.set_num_threads(1)  # so small a model only loses by a second one
WORDS = 32


class Net(torch.nn.Module):
    """A frozen embedding, a learning two-layer middle with dropout, a frozen head."""

    def __init__(self, dtype: torch.dtype, dropout: float) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 8)
        self.down = torch.nn.Linear(8, 5)
        self.up = torch.nn.Linear(5, 8, bias=False)
        self.head = torch.nn.Linear(8, WORDS)
        self.dropout = torch.nn.Dropout(dropout)
        for frozen in (self.embed, self.head):
            frozen.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        state = self.embed(ids)
        return self.head(state + self.up(torch.tanh(self.down(self.dropout(state)))))


class Toy(Adapted):
    """The smallest adapted model."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, dropout: float = 0.3) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.model = Net(dtype, dropout).eval()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        yield

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    merge = detach = save

    def loss(self, pack: Pack) -> Loss:
        """Cross-entropy of each target from the token before it."""
        at = torch.from_numpy(pack.ids[pack.target_source])
        logp = self.model(at).float().log_softmax(-1)
        picked = logp.gather(1, torch.from_numpy(pack.target_ids)[:, None])[:, 0]
        weights = torch.from_numpy(pack.target_weights)
        return Loss(-(picked * weights).sum(), float(weights.sum()))

    def digest(self) -> str:
        """SHA-256 of everything that learned."""
        sha = hashlib.sha256()
        for name, p in sorted(self.trainable().items()):
            sha.update(name.encode() + p.detach().float().numpy().tobytes())
        return sha.hexdigest()


def rows(count: int = 20, *, seed: int = 0) -> list[Rendered]:
    """Rows of 6 to 12 tokens that share a prefix of 3 and supervise the last 3."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(6, 13, (1,), generator=generator))
        ids = [1, 2, 3, *torch.randint(4, WORDS, (length - 3,), generator=generator).tolist()]
        weights = [0.0] * (length - 3) + [1.0, 0.5, 1.0]
        made.append(Rendered(tuple(ids), tuple(weights), length - 3, f"row{index}"))
    return made


def settings(**changes: Any) -> TrainSpec:
    """Settings of a run of a dozen steps."""
    return TrainSpec(**{"epochs": 3, "batch_size": 5, "learning_rate": 0.02, "seed": 3, **changes})


def feed(asked: TrainSpec, data: list[Rendered] | None = None) -> ShuffledFeed:
    """The shuffled feed of the toy rows."""
    return ShuffledFeed(
        data or rows(), batch_size=asked.batch_size, seed=asked.seed, epochs=asked.epochs,
        max_steps=asked.max_steps, budget=asked.tokens_per_pack, share=asked.share_prefixes,
    )  # fmt: skip


def training(toy: Toy, asked: TrainSpec, **more: Any) -> Training:
    """A loop over the toy, ready to iterate."""
    return Training(toy, None, more.pop("feed", None) or feed(asked), asked, **{"loss_of": toy.loss, **more})
