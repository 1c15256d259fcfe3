"""Ways of tuning compared on E2E NLG (restaurant facts to a sentence), scored as the LoRA paper scored them: BLEU
against all references of a meaning representation (MR).

    python bench/e2e_methods.py --budget 4h --out docs/benchmarks/e2e.json

It draws whole MRs (all their references), none near a dev or test MR, until there are `--train-rows` rows, runs `luthier study
methods` (a search for each method's learning rate, then seeds), and scores every run's answers to the official test
MRs. A killed run goes on where it stood: give it the same arguments again.

The official scorer (e2e-metrics) lower-cases, cuts words as mteval-v13a does and takes the reference that is nearest in
length; sacrebleu with `lowercase`, `tokenize=13a` does the same. Differences from the paper: 1,000 of 42,061 rows by
default, greedy answers instead of a beam of 10, another base.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sacrebleu.metrics.bleu import BLEU

from luthier import spec as specs
from luthier.data import leaks
from luthier.data.read import read as read_rows
from luthier.evaluate import predict
from luthier.evaluate.ranking import Standing, rank
from luthier.flows import screen, study
from luthier.records import Score

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "e2e_nlg"
METHODS = "lora,bottleneck,prefix,ia3,bitfit,layers,full"
INSTRUCTION = "Describe the restaurant in one or two plain English sentences that say all of these facts and no others."
PAPER = {  # BLEU in table 3 of 2106.09685, GPT-2 medium, whole training set
    "full": 68.2, "bottleneck": 68.9, "layers": 68.1, "prefix": 69.7, "lora": 70.4,
}  # fmt: skip
SPARE = 2  # rows drawn for each that is kept: those near a held-out row go
Table = dict[str, list[str]]  # MR -> its references


def read(path: Path) -> Table:
    """References by MR, in the order of the file."""
    table: Table = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for mr, reference in list(csv.reader(file))[1:]:
            table[mr].append(" ".join(reference.split()))
    return dict(table)


def draw(table: Table, rows: int, seed: int) -> Table:
    """Whole MRs in random order, until there are at least so many references."""
    order, drawn, count = sorted(table), Table(), 0
    random.Random(seed).shuffle(order)
    for mr in order:
        if count >= rows:
            break
        drawn[mr] = table[mr]
        count += len(table[mr])
    return drawn


def write_rows(path: Path, table: Table, *, first_only: bool = False) -> None:
    """Conversations as JSON lines: one for each reference, or one for each MR."""
    lines = []
    for mr, references in table.items():
        for reference in references[:1] if first_only else references:
            turns = [("system", INSTRUCTION), ("user", mr), ("assistant", reference)]
            lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")


def without_near(train: Table, work: Path) -> Table:
    """MRs of which luthier's guard finds no row near a dev or test row: about four in five.

    The official split parts MRs, not likeness: a training MR may differ from a test MR in the name alone.
    """
    rows = [read_rows([work / f"{side}.jsonl"]).examples for side in ("train", "dev", "test")]
    near = {leak.row.question for leak in leaks.guard(*rows)}
    return {mr: references for mr, references in train.items() if mr not in near}


def prepare(asked: argparse.Namespace) -> tuple[specs.RunSpec, Table]:
    """Write the rows and build the task; also the references of the test MRs."""
    train = draw(read(asked.data / "trainset.csv"), SPARE * asked.train_rows, asked.seed)
    dev = draw(read(asked.data / "devset.csv"), asked.dev_rows, asked.seed)
    test = read(asked.data / "testset_w_refs.csv")
    if asked.test_mrs:
        chosen = random.Random(asked.seed).sample(sorted(test), min(asked.test_mrs, len(test)))
        test = {mr: test[mr] for mr in chosen}
    for name, table in (("train", train), ("dev", dev), ("test", test)):
        write_rows(asked.work / f"{name}.jsonl", table, first_only=name == "test")
    train = draw(without_near(train, asked.work), asked.train_rows, asked.seed)
    write_rows(asked.work / "train.jsonl", train)
    task = {
        "name": "e2e",
        "model": asked.model,
        "runs": str(asked.work / "runs"),
        "data": {side: [str((asked.work / f"{side}.jsonl").resolve())] for side in ("train", "dev", "test")},
        "train": {"epochs": asked.epochs, "batch_size": asked.batch_size, "seed": asked.seed},
        "evaluate": {"primary": "bleu", "few_shot": 0, "max_new_tokens": asked.max_new_tokens},
    }
    return specs.build(task), test


def scored(folder: Path, system: str, references: Table, metric: BLEU) -> list[Score]:
    """Counts of every answer against all references of its MR, in the order of the test rows."""
    found = []
    for item in predict.load(folder / f"{system}.jsonl"):
        one = metric.sentence_score(item.text, references[item.question])
        stats = [one.sys_len, one.ref_len, *one.counts, *one.totals]
        found.append(Score(one.score / 100, parts={"stats": stats, "text": item.text, "mr": item.question}))
    return found


def corpus(scores: Any) -> float:
    """Corpus BLEU in [0, 1] of summed counts: what `corpus_bleu` gives, as `check` proves."""
    stats = np.array([score.parts["stats"] for score in scores]).sum(0).tolist()
    return float(
        BLEU.compute_bleu(
            correct=stats[2:6], total=stats[6:], sys_len=stats[0], ref_len=stats[1], smooth_method="exp"
        ).score
        / 100
    )


def check(scores: list[Score], references: Table, metric: BLEU) -> None:
    """Prove on these answers that summed counts give sacrebleu's own multi-reference value."""
    most = max(len(references[score.parts["mr"]]) for score in scores)
    streams = [
        [(refs + [None] * most)[place] for refs in (references[score.parts["mr"]] for score in scores)]
        for place in range(most)
    ]
    official = BLEU(tokenize="13a", lowercase=True).corpus_score([score.parts["text"] for score in scores], streams)
    assert abs(official.score / 100 - corpus(scores)) < 1e-9, (official.score, corpus(scores))


def told(standing: Standing) -> dict[str, Any]:
    """A system's BLEU, in points."""
    gap = standing.to_best
    return {
        "bleu": 100 * standing.value, "low": 100 * standing.low, "high": 100 * standing.high,
        "seeds": [100 * one for one in standing.seeds], "tied_with_best": standing.tied,
        "to_best": None if gap is None else [100 * gap.difference, 100 * gap.low, 100 * gap.high, gap.p],
    }  # fmt: skip


def judge(report: dict[str, Any], place: Path, references: Table, draws: int) -> dict[str, Any]:
    """Rank the runs by multi-reference BLEU, with intervals over MRs and seeds; LoRA against each other method."""
    metric = BLEU(tokenize="13a", lowercase=True, effective_order=True)
    answers = place / "predictions" / "test"
    base = scored(answers, "base", references, metric)
    check(base, references, metric)
    systems = {}
    for row in report["methods"]:
        keys = [Path(adapter).parent.name for adapter in row.get("adapters", ())]
        if keys:
            systems[row["label"]] = [
                scored(answers, f"{row['method']['name']}-{key}", references, metric) for key in keys
            ]
            check(systems[row["label"]][0], references, metric)
    groups = range(len(base))
    found = rank(base, systems, groups, aggregate=corpus, draws=draws)
    pairs = {}
    for label in systems:
        if "lora" in systems and label != "lora":
            two = rank(base, {"lora": systems["lora"], label: systems[label]}, groups, aggregate=corpus, draws=draws)
            gap = two.systems["lora"].to_best
            other = two.systems[label].to_best
            sign, gap = (1, gap) if gap is not None else (-1, other)
            assert gap is not None, "one of two is not the best"
            ends = sorted((100 * sign * gap.low, 100 * sign * gap.high))
            pairs[label] = {
                "lora_less_it": 100 * sign * gap.difference,
                "low": ends[0],
                "high": ends[1],
                "tie": not gap.clear,
            }
    return {
        "metric": str(metric.get_signature()),
        "mrs": len(base),
        "base": told(found.base),
        "methods": {label: told(one) for label, one in found.systems.items()},
        "lora_against": pairs,
    }


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, best first."""
    lines = [
        "| method | BLEU (95 %) | ties with the best | runs | rate | trained | file | peak GiB | s a step | answers, merged | forgetting | paper |",
        "| - | - | - | - | - | - | - | - | - | - | - | - |",
    ]
    rows = {row["label"]: row for row in result["study"]["methods"]}
    base = result["bleu"]["base"]
    lines.append(f"| base | {base['bleu']:.1f} ({base['low']:.1f} to {base['high']:.1f}) | | | | | | | | 1 | | |")
    for label, one in result["bleu"]["methods"].items():
        row = rows[label]
        speed = [row["speed"][way] for way in ("attached", "merged")]
        lines.append(
            f"| {label} | {one['bleu']:.1f} ({one['low']:.1f} to {one['high']:.1f}) | {'yes' if one['tied_with_best'] else 'no'} "
            f"| {len(one['seeds'])} | {row['learning_rate']:.2g} | {row['trainable']:,} ({100 * row['share']:.2f} %) "
            f"| {row['adapter_bytes'] / 1e6:.2f} MB | {'' if row['memory'] is None else format(row['memory'] / 2**30, '.2f')} "
            f"| {row['step_seconds']:.2f} | {', '.join('-' if s is None else format(s['ratio'], '.2f') for s in speed)} "
            f"| {100 * row['forgetting']['share']:+.1f} % | {PAPER.get(label, '')} |"
        )
    for label, pair in result["bleu"]["lora_against"].items():
        verdict = "a tie" if pair["tie"] else "a difference"
        lines.append(
            f"\nLoRA less {label}: {pair['lora_less_it']:+.1f} BLEU ({pair['low']:+.1f} to {pair['high']:+.1f}), {verdict}."
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default=METHODS, help="names, or {name: lora, rank: 4}, with commas between")
    parser.add_argument("--budget", type=study.seconds_of, default=None, help="45m, 4h; as long as it takes by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--top", type=int, default=4, help="methods that get all seeds")
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--dev-rows", type=int, default=400)
    parser.add_argument("--test-mrs", type=int, default=None, help="all 630 by default")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap over MRs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", default=None)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench-e2e")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "e2e.json")
    return parser.parse_args()


def main() -> None:
    import torch
    from rich.console import Console

    asked = arguments()
    spec, references = prepare(asked)
    with screen.watching(Console(stderr=True)) as listener:
        report = study.study_methods(
            spec, methods=yaml.safe_load(f"[{asked.methods}]"), budget=asked.budget, seeds=asked.seeds, top=asked.top,
            ray=asked.ray, on_event=listener,
        )  # fmt: skip
    result = {
        "arguments": {key: value for key, value in vars(asked).items() if not isinstance(value, Path)},
        "machine": {
            "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "bleu": judge(report, Path(spec.runs) / "e2e-methods", references, asked.draws),
        "study": report,
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n", "utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
