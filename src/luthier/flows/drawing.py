"""A transformer block in characters, with marks where a method sits. Read it from the bottom: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

# What each site is called in the margin; a method's `about.sites` names keys of this table.
SITES: dict[str, str] = {
    "soft_tokens": "learned vectors, in front",
    "prefix_kv": "learned keys and values, in front",
    "linears": "+ a small learned product",
    "kv_factors": "learned factors",
    "mlp_factors": "learned factors",
    "after_attention": "a small learned layer, in line",
    "after_mlp": "a small learned layer, in line",
    "beside_mlp": "a small learned layer, beside",
    "attention_gate": "learned; the gate starts shut",
    "norms": "gains learn",
    "biases": "biases learn",
    "weights": "the matrix learns",
    "sparse_weights": "a few of its numbers learn",
    "top_layers": "only the topmost learn",
    "embeddings": "rows of tokens learn",
    "head": "the output matrix learns",
    "all": "learns",
}
_MATRICES = ("linears", "biases", "weights", "sparse_weights", "all")


@dataclass(frozen=True)
class _Line:
    """One line; `marks` are the sites that it shows, `only` makes it appear for those alone."""

    text: str
    marks: tuple[str, ...] = ()
    only: bool = False


_LINES = (
    _Line("              logits"),
    _Line("                │"),
    _Line("         [ output head ]", ("head", "all")),
    _Line("          [ last norm ]", ("norms", "all")),
    _Line("                │"),
    _Line("╭─ block, many times ──────────────╮", ("top_layers",)),
    _Line("│              (+)◀──────────╮     │"),
    _Line("│      [ bottleneck ]        │     │", ("after_mlp",), only=True),
    _Line("│     [ MLP: down ]          │     │", _MATRICES),
    _Line("│   act(gate) × up × factor  │     │", ("mlp_factors",), only=True),
    _Line("│     act(gate) × up         │     │"),
    _Line("│     [ MLP: gate, up ]      │     │", _MATRICES),
    _Line("│     [ bottleneck ]──▶(+)   │     │", ("beside_mlp",), only=True),
    _Line("│          [ norm ]          │     │", ("norms", "all")),
    _Line("│              ├─────────────╯     │"),
    _Line("│              (+)◀──────────╮     │"),
    _Line("│      [ bottleneck ]        │     │", ("after_attention",), only=True),
    _Line("│     [ output projection ]  │     │", _MATRICES),
    _Line("│     attention ◀─ gate ─ [ prompts ]", ("attention_gate",), only=True),
    _Line("│     attention ◀─ [ k, v ]  │     │", ("prefix_kv",), only=True),
    _Line("│     attention(q, k, v)     │     │"),
    _Line("│     k × factor, v × factor │     │", ("kv_factors",), only=True),
    _Line("│     [ q, k, v matrices ]   │     │", _MATRICES),
    _Line("│          [ norm ]          │     │", ("norms", "all")),
    _Line("│              ├─────────────╯     │"),
    _Line("╰──────────────┼───────────────────╯"),
    _Line("  [ vectors ] ++ text's vectors", ("soft_tokens",), only=True),
    _Line("        [ token embedding ]", ("embeddings", "all")),
    _Line("                │"),
    _Line("              tokens"),
)
_REPLACED = {  # a line that a variant of it stands in for
    "│     act(gate) × up         │     │": "mlp_factors",
    "│     attention(q, k, v)     │     │": "prefix_kv",
}


def draw(sites: Collection[str]) -> str:
    """Draw one block and what is above and below it, with a mark at each of `sites`."""
    unknown = set(sites) - SITES.keys()
    assert not unknown, f"no such sites: {unknown}"
    shown = []
    for line in _LINES:
        here = [site for site in line.marks if site in sites]
        replaced = _REPLACED.get(line.text) in sites or (
            "attention(q, k, v)" in line.text and "attention_gate" in sites
        )
        if (line.only and not here) or replaced:
            continue
        note = f"◀━━ {SITES[here[0]]}" if here else ""
        shown.append(f"{line.text:<38}{note}".rstrip())
    return "\n".join(shown)
