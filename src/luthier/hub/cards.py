"""A kept adapter: PEFT's two files, and beside them a card, the template and the tokenizer it was trained with.

The card is a file of its own (`luthier.json`); nothing of ours goes into `adapter_config.json`, so every PEFT tool
reads the folder. The folder is published whole, under a manifest with the digest of every file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import registry, store
from luthier.contracts import Adapted, Template
from luthier.errors import CheckpointError
from luthier.records import AdapterCard
from luthier.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

CARD = "luthier.json"
TEMPLATE = "template.jinja"


def publish(
    folder: Path, adapted: Adapted, card: AdapterCard, *, template: Template, tokenizer: Tokenizer, readme: str
) -> AdapterCard:
    """Write an adapter folder as a whole and return its card, completed with the digest of every file."""
    written: list[AdapterCard] = []

    def fill(staging: Path) -> None:
        adapted.save(staging)
        tokenizer.save(staging)
        store.write_text(staging / "README.md", readme)
        if template.name == "jinja":
            store.write_text(staging / TEMPLATE, template.source(tokenizer))
        files = {path.name: store.sha256_file(path) for path in sorted(staging.iterdir())}
        written.append(dataclasses.replace(card, files=files))
        store.write_json(staging / CARD, dataclasses.asdict(written[0]))

    store.publish_folder(folder, fill, about={"kind": "adapter", "name": card.name})
    return written[0]


def read(folder: Path) -> AdapterCard:
    """Read the card of an adapter folder after checking every file's digest; damage is a CheckpointError."""
    faults = store.verify_folder(folder)
    if faults:
        raise CheckpointError(f"{folder}: the adapter is damaged", faults=faults)
    told: Mapping[str, Any] = store.read_json(folder / CARD)
    known = {f.name for f in dataclasses.fields(AdapterCard)}
    fields: dict[str, Any] = {key: value for key, value in told.items() if key in known}
    return AdapterCard(**{**fields, "parents": tuple(fields.get("parents", ()))})


def template_of(folder: Path, card: AdapterCard) -> Template:
    """The template that the adapter was trained with: its own copy, never the base's of today."""
    options = dict(card.template)
    if options.get("name") == "jinja":
        options["path"] = str(folder / TEMPLATE)
    template: Template = registry.make("templates", options, "template")
    return template


def require_base(card: AdapterCard, base_hash: str, folder: Path) -> None:
    """Raise CheckpointError unless the base is the very one that the adapter was trained on."""
    if card.base_hash != base_hash:
        raise CheckpointError(
            f"was trained on another base: {card.base} with hash {card.base_hash}, this one has {base_hash}",
            where=str(folder),
            remedy=f"`luthier models pull {card.base}` brings the right one",
        )


def readme(card: AdapterCard, verdict: str) -> str:
    """The adapter folder's README in the form that model hubs show."""
    kept = f" on the base in {card.quantize['name']}, as it is served" if card.quantize else ""
    method = ", ".join(f"{key} {value}" for key, value in card.method.items() if value is not None)
    return "\n".join(
        [
            "---",
            "library_name: peft",
            f"base_model: {card.base}",
            "tags: [luthier]",
            "---",
            f"# {card.name}",
            "",
            verdict,
            "",
            f"Method: {method}. Template: {card.template.get('name')}. Trained in {card.dtype}{kept}.",
            "",
            "```python",
            "from peft import PeftModel",
            "model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)",
            "```",
            "",
            f"With `torch_dtype={card.dtype}` and that flag its logits equal those of training; without the flag PEFT",
            "keeps the adapter in float32 over a bfloat16 base, and logits differ by bfloat16 rounding.",
            "",
        ]
    )
