"""A pack as tensors on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from luthier.model.attention import Tree
from luthier.records import Pack


@dataclass(frozen=True)
class Entry:
    """States (tokens, hidden_size) that enter layer `depth`: the layers below need not run (`model.frozen`)."""

    depth: int
    states: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One prefix tree, ready for a model. Targets are apart from tokens: a branch point has one per branch."""

    ids: torch.Tensor  # (1, tokens)
    positions: torch.Tensor  # (1, tokens)
    tree: Tree
    target_source: torch.Tensor  # (targets,) the token whose state predicts
    target_ids: torch.Tensor  # (targets,)
    target_weights: torch.Tensor  # (targets,) float32
    target_row: torch.Tensor  # (targets,)
    rows: tuple[str, ...]
    plain_tokens: int
    entry: Entry | None = None

    @classmethod
    def of(cls, pack: Pack, device: torch.device | str = "cpu", form: str = "auto") -> Batch:
        """Move a pack to a device and prepare its tree."""
        ids, positions, source, targets, weights, row = (
            torch.from_numpy(array).to(device)
            for array in (
                pack.ids, pack.positions, pack.target_source, pack.target_ids, pack.target_weights, pack.target_row
            )
        )  # fmt: skip
        tree = Tree.of(pack, device, form)
        return cls(ids[None], positions[None], tree, source, targets, weights, row, pack.rows, pack.plain_tokens)

    def entered(self, entry: Entry | None) -> Batch:
        """The same batch, to be run from a layer on; from the first where `entry` is None."""
        return replace(self, entry=entry)

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]
