"""Write demo/train.jsonl and demo/test.jsonl.

The train rows are the hand-written ones in hand_train.tsv followed by rows
composed by compose.py from phrases.yaml with a fixed seed.  The test rows are
all written by hand (hand_test.tsv).  Running this again writes the same bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from compose import Composer, Gold

HERE = Path(__file__).resolve().parent
SEED = 20240917
GENERATED = 700
MAX_WORDS = 30
MAX_SIMILARITY = 0.6
KEYS = ("intent", "item", "problem", "day", "time", "urgent")
INTENTS = ("book", "reschedule", "cancel", "status", "complaint", "quote")


def shingles(text: str) -> set[str]:
    """The character 5-grams of a message."""
    low = text.lower()
    return {low[i : i + 5] for i in range(max(1, len(low) - 4))}


def answer(gold: Gold) -> str:
    """The compact JSON answer with the keys in their fixed order."""
    ordered = {key: gold[key] for key in KEYS}
    return json.dumps(ordered, separators=(",", ":"), ensure_ascii=False)


def generate(phrases: dict[str, Any], taken: list[str]) -> list[tuple[str, Gold]]:
    """The generated rows, none of them close to another or to a taken message."""
    composer = Composer(phrases, random.Random(SEED))
    seen = [shingles(text) for text in taken]
    rows: list[tuple[str, Gold]] = []
    while len(rows) < GENERATED:
        draft = composer.facts(INTENTS[len(rows) % len(INTENTS)])
        text = composer.message(draft)
        grams = shingles(text)
        if not 4 <= len(text.split()) <= MAX_WORDS or not 32 <= len(text) <= 160:
            continue
        if any(len(grams & old) >= MAX_SIMILARITY * len(grams | old) for old in seen):
            continue
        seen.append(grams)
        rows.append((text, draft.gold))
    return rows


def read_hand(path: Path) -> list[tuple[str, Gold]]:
    """Rows of a TSV file: message, tab, the six parts joined by bars ("-" is null)."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text, parts = line.split("\t")
        values = [None if part == "-" else part for part in parts.split("|")]
        gold: Gold = dict(zip(KEYS, values, strict=True))
        gold["urgent"] = {"y": True, "n": False}[gold["urgent"]]
        rows.append((text, gold))
    return rows


def write(path: Path, instruction: str, rows: list[tuple[str, Gold]]) -> None:
    """Write chat rows, one JSON object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for text, gold in rows:
            contents = {"system": instruction, "user": text, "assistant": answer(gold)}
            messages = [{"role": role, "content": content} for role, content in contents.items()]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def main() -> None:
    """Write both files."""
    instruction = (HERE / "instruction.txt").read_text(encoding="utf-8").strip()
    phrases = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    hand = read_hand(HERE / "hand_train.tsv")
    train = hand + generate(phrases, [text for text, _ in hand])
    random.Random(SEED).shuffle(train)
    write(HERE / "train.jsonl", instruction, train)
    write(HERE / "test.jsonl", instruction, read_hand(HERE / "hand_test.tsv"))


if __name__ == "__main__":
    main()
