"""Decide whether states of a base's frozen lower layers are kept for later epochs (`model.frozen`), and keep them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.flows.events import Listener, Note, Stage, silent
from luthier.flows.prepare import Prepared
from luthier.records import Pack

if TYPE_CHECKING:
    import torch

    from luthier.model.frozen import Frozen

PASSES = (
    1.5  # over the rows, from which keeping pays: the first pass costs what a forward pass through the layers costs
)
MEMORY = 0.2  # of the machine's memory may be filled; of all of it, so that a resumed run decides alike


def keep_lower(
    model: Any, prepared: Prepared, dev_packs: Sequence[Pack], *, share: bool, known: Frozen | None = None,
    again: bool = False, tell: Listener = silent,
) -> Frozen | None:  # fmt: skip
    """Keep the states below the lowest layer that learns, of all training and dev rows; None where it would not pay.

    With `again` other trials on the same base and rows will come, which the states serve too where they are as deep:
    `known` are those of an earlier one.
    """
    from luthier.model import frozen

    if not (again or _pays(prepared)) or not (count := _depth(model, prepared)):
        return None
    serves = known is not None and known.depth == count and bool(dev_packs)
    if known is not None and serves and not frozen.differs(model, known, min(dev_packs, key=len)):
        return known
    packs = [*_packs(prepared, share), *dev_packs]
    size = _bytes(model, packs)
    if size > MEMORY * memory(model.device):
        tell(Note(f"{count} frozen layers run in every epoch: their states would take {size / 1e9:.1f} GB"))
        return None
    tell(Stage("keep the lower layers' states", f"{count} frozen layers, {size / 1e6:.0f} MB"))
    kept = frozen.keep(model, packs, count)
    if reason := frozen.differs(model, kept, min(packs, key=len)):
        tell(Note(f"{count} frozen layers run in every epoch: {reason}", "warning"))
        return None
    return kept


def foreseen(model: Any, prepared: Prepared, dev_packs: Sequence[Pack], *, share: bool, room: int) -> int:
    """Bytes of the states that a run would keep where there are `room` bytes of memory in all; `model` may be bare."""
    if not _pays(prepared) or not _depth(model, prepared):
        return 0
    size = _bytes(model, [*_packs(prepared, share), *dev_packs])
    return size if size <= MEMORY * room else 0


def _pays(prepared: Prepared) -> bool:
    """Whether the rows are seen often enough."""
    settings = prepared.spec.train
    steps = prepared.feed(share=False).total_steps
    return steps * settings.batch_size >= PASSES * len(prepared.train)


def _depth(model: Any, prepared: Prepared) -> int:
    """Layers whose states can be kept, where the task lets them be."""
    from luthier.model import frozen

    if not prepared.spec.train.keep_lower_states or prepared.stream is not None:
        return 0
    return frozen.depth(model)


def _packs(prepared: Prepared, share: bool) -> list[Pack]:
    from luthier.text import pack

    rows = [row for example in prepared.train for row in prepared.branches(example)]
    return pack.plan(rows, budget=prepared.spec.train.tokens_per_pack, share=share)


def _bytes(model: Any, packs: Sequence[Pack]) -> int:
    size: int = model.config.get_text_config().hidden_size * model.dtype.itemsize
    return size * sum(len(pack) for pack in packs)


def memory(device: torch.device | str) -> int:
    """Bytes of memory, in all, where states would lie; a run's processes on one machine share it."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import psutil

    return int(psutil.virtual_memory().total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
