"""Chosen layers: the last blocks, ranges, or whatever fits a pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.errors import Fault, SpecError

LAST = 2  # blocks, where nothing else is said
RANGE = re.compile(r"^(\d+)-(\d+)$")


class Options(contracts.Options):
    """Which layers learn; what is named in several ways is united."""

    last: int | None = Field(None, ge=1, description=f"the last so many blocks; {LAST} where nothing else is named")
    indices: list[int | str] | None = Field(None, description="blocks by number, or ranges as '4-9'; from 0")
    names: list[str] | None = Field(None, description="modules or parameters by pattern: '*.mlp.*', 'q_proj'")


class Layers(contracts.Method):
    Options = Options
    fresh = "exact"
    learning_rate = 1e-4
    bracket = (1e-5, 1e-3)
    about = contracts.About(
        family="selective",
        title="chosen layers: the last blocks learn, the rest is frozen",
        trains="the weights of chosen blocks or modules",
        formula="W' = W + dW, for the chosen W",
        source="top-layer tuning as in Hu et al. 2021, arXiv 2106.09685, table 3 (FT Top2)",
        sites=("top_layers",),
        text=(
            "Two or three of the last blocks learn in full, everything below them stays as it was. Nothing is "
            "computed backwards below the lowest chosen block, so a step is cheaper than with any method that sits in "
            "all blocks. `indices` and `names` choose other blocks, or single modules of all blocks by pattern. What "
            "is kept is the chosen tensors, and they replace the base's own without cost when the model answers."
        ),
        folklore=(
            (
                "the last layers are where a task is learnt",
                "often near full tuning, but measure: some tasks want all of them",
            ),
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Free the chosen layers; SpecError for numbers and patterns that fit nothing."""
        from luthier.adapt import blocks
        from luthier.adapt.freed import FreedAdapted

        options, names = self.options, [name for name, _ in model.named_parameters()]
        chosen = set(blocks.choose(names, options.names, "method.names")) if options.names else set()
        layers = blocks.blocks(model) if options.last or options.indices or not options.names else []
        wanted = _wanted(options.indices or [], len(layers))
        last = options.last or (LAST if not options.indices and not options.names else 0)
        if last > len(layers):
            raise SpecError(f"is {last}, this model has {len(layers)} blocks", where="method.last")
        wanted |= set(range(len(layers) - last, len(layers)))
        prefixes = tuple(f"{layer.name}." for layer in layers if layer.index in wanted)
        return FreedAdapted(model, [name for name in names if name in chosen or name.startswith(prefixes)])

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put saved layers on the model."""
        from luthier.adapt import freed

        return freed.load(model, folder)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay pulls matrices towards zero; gains and biases have no reason to go there."""
        return {name: {"weight_decay": 0.0} for name in names if name.endswith("bias") or "norm" in name}


def _wanted(indices: Sequence[int | str], count: int) -> set[int]:
    """Block numbers from numbers and ranges; SpecError lists all that cannot be."""
    wanted, faults = set[int](), []
    for place, index in enumerate(indices):
        found = RANGE.match(str(index))
        first, last = (int(found[1]), int(found[2])) if found else (index, index)
        if isinstance(first, str) or isinstance(last, str):
            faults.append(Fault(f"method.indices[{place}]", f"'{index}' is neither a number nor a range like '4-9'"))
        elif not 0 <= first <= last < count:
            faults.append(Fault(f"method.indices[{place}]", f"{index} is outside 0-{count - 1}, this model's blocks"))
        else:
            wanted |= set(range(first, last + 1))
    if faults:
        raise SpecError("method.indices: blocks that are not there", faults=faults)
    return wanted
