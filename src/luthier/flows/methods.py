"""`luthier methods [NAME]`: the shelf of tuning methods as a table, and one page for each."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from luthier import registry
from luthier.contracts import Method
from luthier.evaluate import wording
from luthier.flows.drawing import draw

if TYPE_CHECKING:
    from rich.console import Console

FAMILIES = ("additive", "selective", "reparametrised", "full")
REFERENCE = "SmolLM2-135M"
# The reference model's sizes; its weights are not needed for counting.
SIZES = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def table() -> list[dict[str, Any]]:
    """One row per method, family by family; counts are those on SmolLM2-135M with the method's defaults."""
    rows = [row(name) for name in registry.names("methods") if not needs_options(name)]
    return sorted(rows, key=lambda row: (FAMILIES.index(row["family"]), row["name"]))


def needs_options(name: str) -> bool:
    """Whether a method means nothing without options, as the door to the rest of PEFT does."""
    return any(field.is_required() for field in registry.find("methods", name).Options.model_fields.values())


def row(name: str) -> dict[str, Any]:
    """The facts of one method, with stable keys."""
    method: Method = registry.make("methods", name)
    trainable, size = measured(name)
    low, high = method.bracket
    return {
        "name": name,
        "family": method.about.family,
        "title": method.about.title,
        "trains": method.about.trains,
        "trainable": trainable,
        "share": trainable / base_parameters(),
        "saved_bytes": size,
        "merges": not method.not_merged,
        "fresh": method.fresh,
        "learning_rate": method.learning_rate,
        "bracket": [low, high],
        "source": method.about.source,
    }


def page(name: str) -> dict[str, Any]:
    """Everything about one method; UnknownName with the nearest name where there is none."""
    method_class: Any = registry.find("methods", name)
    method = registry.make("methods", name) if not needs_options(name) else None
    about = method_class.about
    facts = (
        row(name) if method else {"name": name, "family": about.family, "title": about.title, "trains": about.trains}
    )
    return {
        **facts,
        "source": about.source,
        "formula": about.formula,
        "text": about.text,
        "not_merged": method.not_merged if method else "",
        "drawing": draw(about.sites),
        "folklore": [{"said": said, "true": true} for said, true in about.folklore],
        "options": [
            {
                "name": option,
                "default": None if field.is_required() else field.get_default(call_default_factory=True),
                "required": field.is_required(),
                "what": field.description or "",
            }
            for option, field in method_class.Options.model_fields.items()
        ],
    }


@cache
def base_parameters() -> int:
    """Parameters of the reference model, a tied head counted once."""
    return sum(weight.numel() for weight in _reference().parameters())


@cache
def measured(name: str) -> tuple[int, int]:
    """Numbers that learn, and bytes that the folder's tensors take, on the reference model."""
    adapted = registry.make("methods", name).attach(_reference(), seed=0)
    return sum(p.numel() for p in adapted.trainable().values()), adapted.saved_bytes()


def _reference() -> Any:
    """The reference model's shapes without weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.model.quiet import quiet

    with quiet(), torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False)  # type: ignore[arg-type]


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table to a person, one part for each family."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"Ways of tuning; counts on {REFERENCE} with default options"
    wide = console.width >= 110
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("method", no_wrap=True)
    for column in ("learns", "saved", "merges", "rate"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("what learns")
    if wide:
        shown.add_column("paper", no_wrap=True)
    family = ""
    for one in rows:
        if one["family"] != family:
            family = one["family"]
            shown.add_section()
            shown.add_row(f"[bold]{family}[/]")
        cells = [
            one["name"], share_words(one["share"]), wording.size(one["saved_bytes"]), "yes" if one["merges"] else "no",
            f"{one['learning_rate']:g}", one["trains"], *([arxiv(one["source"])] if wide else []),
        ]  # fmt: skip
        shown.add_row(*cells)
    console.print(shown)
    console.print("luthier methods NAME tells one of them in plain words; method peft opens the rest of PEFT's shelf.")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for the documentation."""
    lines = ["| method | what learns | learns | saved | merges | rate | paper |", "| - | - | - | - | - | - | - |"]
    family = ""
    for one in rows:
        if one["family"] != family:
            family = one["family"]
            lines.append(f"| **{family}** | | | | | | |")
        cells = (
            f"`{one['name']}`", one["trains"], share_words(one["share"]), wording.size(one["saved_bytes"]),
            "yes" if one["merges"] else "no", f"{one['learning_rate']:g}", arxiv(one["source"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arxiv(source: str) -> str:
    """The paper's id in a source line, or nothing."""
    found = re.search(r"\d{4}\.\d{5}", source)
    return found.group() if found else ""


def print_page(told: dict[str, Any], console: Console) -> None:
    """Print one method's page to a person."""
    from rich.text import Text

    console.print(Text(told["title"], "bold"))
    console.print(Text(f"{told['family']}; {told['source']}", "dim"))
    console.print()
    console.print(told["text"], markup=False, highlight=False)
    console.print(f"\n  {told['formula']}\n", markup=False, highlight=False)
    console.print(Text(told["drawing"]))
    console.print()
    if "trainable" in told:
        console.print(
            f"On {REFERENCE}: {told['trainable']:,} numbers learn ({share_words(told['share'])}), the folder takes "
            f"{wording.size(told['saved_bytes'])}. Search the learning rate between {told['bracket'][0]:g} and "
            f"{told['bracket'][1]:g}; default {told['learning_rate']:g}.",
            highlight=False,
        )
    merged = f"Cannot be merged: {told['not_merged']}." if told["not_merged"] else "Merges into the base's weights."
    console.print(merged, markup=False, highlight=False)
    for option in told["options"]:
        default = "required" if option["required"] else f"default {option['default']!r}"
        console.print(f"  method.{option['name']}: {option['what']} ({default})", markup=False, highlight=False)
    for one in told["folklore"]:
        console.print(Text(f'\nSaid: "{one["said"]}"', "yellow"))
        console.print(f"True: {one['true']}.", markup=False, highlight=False)


def share_words(share: float) -> str:
    """A share as a percentage with two significant digits."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
