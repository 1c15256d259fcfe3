"""Measurements in a terminal: every figure with its range, and where a step's time goes in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.evaluate.wording import size
from luthier.flows.plan import PARTS as MEMORY

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PARTS = {
    "base_forward": "matrix products of the base, forward",
    "base_backward": "matrix products of the base, backward",
    "adapter": "matrix products of what learns beside it",
    "attention": "attention",
    "head": "output head and its probabilities",
    "elementwise": "norms, activations, rotation, adding up",
    "recomputed": "forward once more (train.checkpointing)",
    "optimiser": "optimiser",
    "data": "choosing and packing rows",
    "rest": "between operations (Python, autograd, waiting)",
}


def print_train(told: Mapping[str, Any], console: Console) -> None:
    """Print what `luthier bench train` found."""
    console.print(_where(told, f"{told['task']}: {told['base']} with {told['method']}"))
    rows = [
        ("seconds a step", ranged(told["seconds_a_step"])),
        ("rows a second", ranged(told["rows_a_second"])),
        ("tokens a second, as rows have them", ranged(told["tokens_a_second"])),
        ("tokens a second, computed", ranged(told["computed_tokens_a_second"])),
        ("GFLOP that a step needs", ranged(told["gflop_a_step"])),
        ("GFLOP/s reached", ranged(told["gflops"])),
        ("GFLOP/s possible, matrix products alone", ranged(told["limit"]["gflops"])),
        ("share of what is possible", percent(told["share_of_limit"])),
        ("peak memory of the process", size(told["peak_bytes"])),
    ]
    console.print(_table(f"{told['steps']} steps: median (least to most)", rows))
    gain = told["gain"]
    tokens = f"{gain['computed_tokens']:.0f} of {gain['plain_tokens']:.0f} tokens are computed"
    console.print(
        f"Work that is not done: {gain['less_work']:.1f} times less in all, {gain['less_work_by_sharing']:.1f} by "
        f"sharing ({tokens}), {gain['less_work_by_logits']:.1f} by the head at {gain['targets']:.0f} targets only."
    )
    if told["profile"]:
        _print_profile(told, console)


def _print_profile(told: Mapping[str, Any], console: Console) -> None:
    found, work = told["profile"], told["gflop_by_part"]
    rows = []
    for part, one in found["parts"].items():
        seconds = one["seconds"]["median"]
        speed = f"{work[part] / seconds:.0f} GFLOP/s" if work.get(part) and seconds else ""
        rows.append((PARTS[part], f"{100 * one['share']:.1f} %", ranged(one["seconds"]), speed))
    title = f"Where the time of a step goes ({ranged(found['seconds_a_step'])} s while watched)"
    console.print(_table(title, rows))
    console.print(_table("The limit, shape by shape", [
        (f"{one['rows']} x {one['inner']} x {one['columns']}", f"{one['times']:.0f} times", ranged(one["gflops"]))
        for one in told["limit"]["shapes"]
    ]))  # fmt: skip
    memory = found["memory"]
    if memory:
        parts = [(MEMORY.get(part, part), size(count)) for part, count in memory["parts"].items()]
        console.print(_table(f"Memory as planned, {size(memory['peak_bytes'])} at the worst moment", parts))
    rendering = told["rendering"]
    console.print(f"Reading and rendering {rendering['rows']} rows took {rendering['seconds']:.2f} s, once.")


def print_evaluate(told: Mapping[str, Any], console: Console) -> None:
    """Print what `luthier bench evaluate` found."""
    console.print(_where(told, f"{told['task']}: {told['base']} answers {told['rows']} rows"))
    rows = [
        ("seconds in all", ranged(told["seconds"])),
        ("rows a second", ranged(told["rows_a_second"])),
        ("new tokens a second, prompts included", ranged(told["new_tokens_a_second"])),
        *_answering(told),
        ("seconds of scoring", number(told["scoring_seconds"])),
    ]
    console.print(_table(f"{told['batch_size']} rows at a time: median (least to most)", rows))


def print_generate(told: Mapping[str, Any], console: Console) -> None:
    """Print what `luthier bench generate` found."""
    console.print(_where(told, str(told["base"])))
    for one in told["batches"]:
        title = f"Batch of {one['batch_size']}, {told['new_tokens']} tokens each: median (least to most)"
        console.print(_table(title, _answering(one)))


def _answering(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    first, decode = told["prefill"], told["decode"]
    rows = [
        ("prompts: seconds", ranged(first["seconds"])),
        ("prompts: tokens a second", ranged(first["tokens_a_second"])),
        ("prompts: tokens that must be computed", f"{first['needed_tokens']:,} of {first['prompt_tokens']:,}"),
        ("prompts: GFLOP/s reached", ranged(first["gflops"])),
        ("prompts: share of what is possible", percent(first["share_of_limit"])),
    ]
    if decode is None:
        return rows
    return [
        *rows,
        ("answers: seconds", ranged(decode["seconds"])),
        ("answers: tokens a second", ranged(decode["tokens_a_second"])),
        ("answers: tokens a second possible", number(decode["limit_tokens_a_second"])),
        ("answers: share of what is possible", percent(decode["share_of_limit"])),
    ]


def _where(told: Mapping[str, Any], what: str) -> str:
    one = told["machine"]
    return f"{what}, on {one['device']} ({one['capability']}, {one['threads']} threads, {one['dtype']})"


def _table(title: str, rows: list[Any]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def ranged(spread: Mapping[str, float]) -> str:
    """`7.1 (6.9 to 7.4)`."""
    return f"{number(spread['median'])} ({number(spread['low'])} to {number(spread['high'])})"


def percent(spread: Mapping[str, float]) -> str:
    """`54 % (51 to 57)`."""
    return f"{100 * spread['median']:.0f} % ({100 * spread['low']:.0f} to {100 * spread['high']:.0f})"


def number(value: float) -> str:
    """Three digits that matter, thousands set apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
