"""BOFT's block-diagonal matrices in plain torch, in the place of the CUDA extension that PEFT would compile.

PEFT starts a compiler at BOFT's first layer, and where that fails, it silently does without butterflies: a folder of
two or more would then fit one machine and not another. With this in its place, every device computes the same, and
nothing is compiled.
"""

from __future__ import annotations

import torch
from peft.tuners.boft import layer


class BlockDiagonal:
    """What PEFT's extension offers: a forward and a backward pass, each returning a list of one tensor."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        """Blocks (n, d, h, h) as matrices (n, d h, d h) with them along the diagonal."""
        count, many, size, _ = blocks.shape
        whole = blocks.new_zeros(count, many, size, many, size)
        whole.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
        return [whole.view(count, many * size, many * size)]

    @staticmethod
    def backward(gradient: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        """The gradient (n, d h, d h) at the blocks (n, d, h, h)."""
        count, many, size, _ = blocks.shape
        apart = gradient.reshape(count, many, size, many, size)
        return [apart.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


def instead_of_compiling() -> None:
    """Let PEFT find these functions where it looks for its extension, unless it has compiled one already."""
    if not layer._FBD_CUDA:
        layer._FBD_CUDA = BlockDiagonal  # type: ignore[assignment]
