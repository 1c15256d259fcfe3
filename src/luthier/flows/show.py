"""`luthier show task.yaml`: rows as the model sees them, the part that is learnt in colour, and what is hidden."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.errors import UsageError
from luthier.flows.events import Listener
from luthier.flows.gather import Gathered, gather
from luthier.flows.prepare import assemble
from luthier.records import Example, Rendered
from luthier.spec import RunSpec
from luthier.text import pack
from luthier.text import show as texts

if TYPE_CHECKING:
    from rich.console import Console

SIDES = ("train", "dev", "test")


@dataclass(frozen=True)
class Shown:
    """Some rows of one side, and figures over all of that side's."""

    gathered: Gathered
    side: str
    examples: Sequence[Example]
    rendered: Sequence[Rendered]
    discarded: Mapping[str, list[str]]  # by origin: what the template leaves out
    hidden_system: str | None
    mask: Mapping[str, float]
    sharing: pack.Sharing

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; the keys are stable."""
        tokenizer = self.gathered.tokenizer
        rows = [
            {
                "origin": str(example.origin),
                "prompt": tokenizer.decode(row.ids[: row.prompt_length], skip_special=False),
                "answer": tokenizer.decode(row.ids[row.prompt_length :], skip_special=False),
                "ids": list(row.ids),
                "weights": list(row.weights),
                "prompt_length": row.prompt_length,
                "cut": row.cut,
                "discarded": self.discarded[str(example.origin)],
            }
            for example, row in zip(self.examples, self.rendered, strict=True)
        ]
        return {
            "side": self.side,
            "rows": rows,
            "hidden_system": self.hidden_system,
            "mask": dict(self.mask),
            "sharing": {**dataclasses.asdict(self.sharing), "factor": self.sharing.factor},
        }


def show(spec: RunSpec, *, rows: int = 3, side: str = "train", on_event: Listener | None = None) -> Shown:
    """Render the first rows of a side; raise SpecError or DataError with every row that cannot be rendered."""
    if side not in SIDES:
        raise UsageError(f"there is no side '{side}'", remedy=f"one of: {', '.join(SIDES)}")
    found = gather(spec, on_event=on_event)
    prepared = assemble(found, [])
    examples: list[Example] = getattr(prepared, side)
    rendered: list[Rendered] = getattr(prepared, f"rendered_{side}")
    if not examples:
        raise UsageError(f"there are no {side} rows", remedy=f"name a file or a share in data.{side}")
    packs = pack.plan(rendered, budget=spec.train.tokens_per_pack, share=not prepared.separate)
    shown = examples[:rows]
    return Shown(
        gathered=found,
        side=side,
        examples=shown,
        rendered=rendered[:rows],
        discarded={str(one.origin): _discarded(one, found) for one in shown},
        hidden_system=prepared.hidden_system,
        mask=texts.mask_summary(rendered),
        sharing=pack.sharing(packs),
    )


def _discarded(example: Example, found: Gathered) -> list[str]:
    return texts.discarded(example, found.template, found.tokenizer) if example.prompt else []


def print_shown(shown: Shown, console: Console) -> None:
    """Print the rows in colour and the figures below them."""
    from rich.text import Text

    for example, row in zip(shown.examples, shown.rendered, strict=True):
        console.print(texts.show(example, row, shown.gathered.tokenizer))
        for lost in shown.discarded[str(example.origin)]:
            console.print(Text(f"the template leaves out: {texts.visible(lost)}", "yellow"))
        console.print()
    if shown.hidden_system:
        told = texts.visible(shown.hidden_system)
        console.print(Text(f"The template adds a system message to rows that have none: {told}", "yellow"))
    mask, sharing = shown.mask, shown.sharing
    console.print(
        f"All {mask['rows']:.0f} {shown.side} rows: {mask['tokens']:,.0f} tokens, {mask['share']:.1%} learnt; "
        f"the longest has {mask['longest']:.0f}."
    )
    console.print(
        f"Shared prefixes: {sharing.computed_tokens:,} tokens are computed for {sharing.plain_tokens:,} "
        f"({sharing.factor:.1f} times fewer)."
    )
    if shown.gathered.separate:
        console.print(f"This model cannot share prefixes: {shown.gathered.separate}.")
    console.print(Text("dim: read, green: learnt, magenta: control tokens, ‖: where generation starts", "dim"))
