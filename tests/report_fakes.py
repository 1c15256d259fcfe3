"""A believable run for tests and for looking at the page: a repair desk's messages, three systems, a loss curve."""

from __future__ import annotations

import json
import random

from luthier import registry
from luthier.evaluate import predict, report
from luthier.records import Completion, Example, Message, Origin, Prediction

INSTRUCTION = (
    "Turn a message to a repair desk into one line of JSON with the keys intent, item, problem, day, time, urgent. "
    "Use null for what is not said. Message: "
)
ITEMS = ("bike", "phone", "laptop", "zip jacket", "kettle", "backpack", "boots", "tablet", "scooter", "伞")
PROBLEMS = ("broken_screen", "flat_tyre", "brakes", "battery", "zip", "strap", "sole", "leak", "noise", "no_power")
DAYS = (None, "mon", "tue", "wed", "thu", "fri", "sat", "today", "tomorrow")
TIMES = (None, "morning", "afternoon", "14:00", "09:30", "evening")
PHRASES = (
    "hiya, my {item} has a {problem} thing going on, could someone look {day} {time}?",
    "The {item} again... {problem}, second time this month. {day} {time} would suit me",
    "{item}: {problem}. need it {day} {time}, wedding!!",
    "Could you tell me roughly what a {problem} repair on a {item} costs? Free {day} {time}.",
    "moved house so forget the old slot, {item} ({problem}) {day} {time} pls",
)


def record(rng: random.Random) -> dict[str, object]:
    return {
        "intent": rng.choice(("book", "quote", "reschedule", "status", "complaint")),
        "item": rng.choice(ITEMS),
        "problem": rng.choice(PROBLEMS),
        "day": rng.choice(DAYS),
        "time": rng.choice(TIMES),
        "urgent": rng.random() < 0.3,
    }


def examples(count: int, seed: int, file: str) -> list[Example]:
    rng = random.Random(seed)
    made = []
    for line in range(1, count + 1):
        gold = record(rng)
        told = {key: "" if value is None else value for key, value in gold.items()}
        text = " ".join(rng.choice(PHRASES).format(**told).split()) + f" (ref {rng.randrange(10_000)})"
        answer = json.dumps(gold, ensure_ascii=False, separators=(",", ":"))
        made.append(Example((Message("user", INSTRUCTION + text), Message("assistant", answer)), Origin(file, line)))
    return made


def answer(example: Example, rng: random.Random, skill: float) -> Completion:
    """An answer whose fields are right with probability `skill`; weak systems also ramble and break their JSON."""
    gold = json.loads(example.answer)
    wrong = record(rng)
    told = {key: value if rng.random() < skill else wrong[key] for key, value in gold.items()}
    if rng.random() < 0.06:
        return Completion(json.dumps(gold if skill < 0.5 else {**gold, "problem": "other"}))
    if skill < 0.5:
        style = rng.random()
        if style < 0.35:
            return Completion("Sure! I can help you with that. What is the problem with your item?")
        if style < 0.5:
            return Completion(json.dumps(told)[:40], stop="length")
        if style < 0.6:
            return Completion("")
        if style < 0.8:
            return Completion(
                f"Here is the JSON:\n```json\n{json.dumps({**told, 'customer': 'unknown'}, indent=1)}\n```"
            )
    return Completion(json.dumps(told, ensure_ascii=False))


def answered(rows: list[Example], skill: float, seed: int, scorers: dict) -> list[Prediction]:
    rng = random.Random(seed)
    return predict.score_all(predict.pair(rows, [answer(row, rng, skill) for row in rows]), scorers, rows)


def steps(count: int = 120, overfit: bool = False) -> list[dict]:
    rng = random.Random(3)
    made = []
    for index in range(1, count + 1):
        loss = 1.9 * 0.96**index + 0.09 + rng.uniform(-0.04, 0.04)
        dev = 1.9 * 0.965**index + 0.14 + (0.002 * max(0, index - 70) if overfit else 0)
        made.append(
            {
                "index": index,
                "epoch": index / 40,
                "loss": max(loss, 0.02),
                "learning_rate": 1e-3,
                "grad_norm": 0.8,
                "tokens": 1480,
                "plain_tokens": 6210,
                "supervised": 420.0,
                "examples": 16,
                "seconds": 1.7,
                "memory": 1_430_000_000,
                "dev_loss": dev if index % 15 == 0 else None,
            }
        )
    return made


def scorers_of(*names: str) -> dict:
    return {name: registry.make("scorers", name) for name in names}


def build(skill: float = 0.95, base_skill: float = 0.3, count: int = 170, draws: int = 2000, **more: object) -> dict:
    """A whole report; `skill` is the tuned model's chance to get a field right."""
    scorers = scorers_of("json_fields", "exact", "f1", "chrf")
    test, dev = examples(count, 1, "desk_test.jsonl"), examples(count, 2, "desk.jsonl")

    def systems(rows: list[Example], seed: int) -> dict[str, list[Prediction]]:
        return {
            "base": answered(rows, base_skill, seed, scorers),
            "base_few_shot": answered(rows, 0.55, seed + 1, scorers),
            "tuned": answered(rows, skill, seed + 2, scorers),
        }

    facts = {
        "name": "repair-desk",
        "created": "2026-03-14 09:26",
        "seconds": {"base": 41.0, "base_few_shot": 66.2, "tuned": 38.4},
        "data": {
            "rows": {"train": 742, "dev": count, "test": count},
            "skipped": 3,
            "leaks_removed": 2,
            "near_duplicates": 11,
            "files": [{"file": "desk.jsonl", "encoding": "utf-8", "sha256": "9f2c4e1ab07d33d1"}],
        },
        "training": {"best_step": 120, "restored_step": 120, "ended": "complete", "overfit": ""},
        "ledger": {"opened": 1},
        "provenance": {
            "base_hash": "41c9a7b6d0aa91f2",
            "adapter_hash": "b7e61d9004cc7e58",
            "template": {"name": "chat", "hash": "77aa01"},
            "decoding": {"temperature": 0.0, "max_new_tokens": 64},
            "versions": {"luthier": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
        },
    }
    given = {
        "spec": {
            "name": "repair-desk",
            "model": {"name": "smollm2-135m"},
            "evaluate": {"primary": "json_fields", "seed": 0},
        },
        "facts": facts,
        "systems": systems(test, 10),
        "browse": systems(dev, 20),
        "scorers": scorers,
        "steps": steps(),
        "checks": {
            "merged equals attached": "largest logit difference 2.1e-6",
            "chance level": {"json_fields": "24.1 %"},
        },
        "draws": draws,
    }
    return report.build(**{**given, **more})
