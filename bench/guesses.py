"""What guessed tokens save where a model answers as the data does: passes counted without a model, time computed.

    python bench/guesses.py --data demo snips_nlu e2e_nlg --rows 96 --out docs/benchmarks/guesses.json

Rows are answered in groups of each size, one group after another. The time of a pass is `model.lookup.Pace`'s, whose
figures were measured; the speed-up is over the same groups without guesses. Real answers repeat each other at least as
much as the data's.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import DATA, rows_of

from luthier import registry
from luthier.model import catalog, lookup
from luthier.records import Example, Message, Origin, Rendered
from luthier.text.render import render_all
from luthier.text.tokenizer import Tokenizer

TOGETHER = (1, 4, 8, 16, 32)


class Row:
    """A row whose answer is known; `at` tokens of it are out."""

    def __init__(self, row: Rendered) -> None:
        self.prompt, self.answer, self.at = row.ids[: row.prompt_length], row.ids[row.prompt_length :], 1
        self.grams = lookup.Grams()
        self.grams.extend([*self.prompt, self.answer[0]])

    def guess(self, earlier: lookup.Grams) -> lookup.Guess:
        most = min(lookup.MOST, len(self.answer) - self.at - 1)
        return (
            lookup.guess(self.grams.text[-lookup.LEAD :], (earlier, self.grams), most) if most > 0 else lookup.Guess()
        )

    def take(self, guess: lookup.Guess) -> int:
        """Move on by what one pass gives; returns how many guessed tokens were right."""
        wanted = self.answer[self.at : self.at + len(guess.tokens)]
        right = next((n for n, (a, b) in enumerate(zip(wanted, guess.tokens, strict=True)) if a != b), len(wanted))
        self.grams.extend(self.answer[self.at : self.at + right + 1])
        self.at += right + 1
        return right


def cost(tokens: int) -> int:
    """A pass in tokens' arithmetic."""
    return lookup.Pace.ALONE if tokens == 1 else lookup.Pace.WEIGHTS + tokens


def simulate(rendered: Sequence[Rendered], together: int, *, guessing: bool) -> dict[str, float]:
    """Passes, tokens and computed cost of answering all rows."""
    pace, earlier = lookup.Pace(), lookup.Grams()
    found = {"passes": 0, "row_passes": 0, "tokens": 0, "cost": 0}
    for first in range(0, len(rendered), together):
        group = [Row(row) for row in rendered[first : first + together]]
        while live := [row for row in group if row.at < len(row.answer)]:
            guesses = [row.guess(earlier) if guessing else lookup.Guess() for row in live]
            width = pace.width(guesses)
            guesses = [each.cut(width) for each in guesses]
            found["passes"] += 1
            found["row_passes"] += len(live)
            found["cost"] += cost(len(live) * (1 + max(len(each.tokens) for each in guesses)))
            for row, each in zip(live, guesses, strict=True):
                right = row.take(each)
                found["tokens"] += right + 1
                if each.tokens:
                    pace.saw(each, right)
        for row in group:
            earlier.extend([*row.prompt[-lookup.LEAD :], *row.answer], apart=True)
    return found


def told(name: str, count: int) -> dict[str, Any]:
    """One data set at every group size."""
    folder = catalog.locate("smollm2-135m")
    table = rows_of(name)
    random.Random(0).shuffle(table)
    examples = [
        Example(tuple(Message(t["role"], t["content"]) for t in turns), Origin(f"{name}:{place}"))
        for place, turns in enumerate(table[:count])
    ]
    rendered = render_all(examples, registry.make("templates", "chat"), Tokenizer.from_folder(folder)).rendered
    made = {}
    for together in TOGETHER:
        plain, guessed = (simulate(rendered, together, guessing=guessing) for guessing in (False, True))
        made[str(together)] = {
            "tokens_per_row_and_pass": round(guessed["tokens"] / guessed["row_passes"], 3),
            "computed_speed_up": round(plain["cost"] / guessed["cost"], 3),
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=["demo"])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = {name: told(name, asked.rows) for name in asked.data}
    print(json.dumps(found, indent=2))
    if asked.out:
        asked.out.write_text(json.dumps({"rows": asked.rows, "data": found}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
