"""What a study of methods found, as one dictionary: every method's numbers, who ties, one piece of advice.

`study_page` draws it; nothing is decided there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.contracts import Scorer
from luthier.evaluate import wording
from luthier.evaluate.predict import clusters_of
from luthier.evaluate.ranking import Gap, Ranking, Standing, rank

FORMAT = 1
FORGETS = 0.03  # rise of the loss on general text that counts as forgetting
Row = dict[str, Any]


def build(
    *, facts: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any], scorer: Scorer
) -> dict[str, Any]:
    """Rank the methods and gather what the report shows; methods that could not be judged come last."""
    ranking = _ranking(known, scorer, facts["metric"], facts["seed"])
    rows = [_row(label, methods[label], standing, known, facts) for label, standing in ranking.systems.items()]
    rows += [_failed(label, about) for label, about in methods.items() if label not in ranking.systems]
    report = {
        "format": FORMAT,
        **{key: facts[key] for key in ("name", "created", "model", "metric", "seconds", "budget", "said", "ray")},
        "n": ranking.n,
        "groups": ranking.groups,
        "rows": {**facts["rows"], "test": ranking.n},
        "parameters": facts["parameters"],
        "plan": {**facts["shape"], "task_steps": facts["task_steps"], "asked_seeds": facts["asked_seeds"]},
        "provisional": provisional(facts["shape"]["rates"], ranking),
        "base": {
            **_score(ranking.base),
            "dev_loss": known["base_dev_loss"],
            "general_loss": next((one["base"] for one in known["forgetting"].values()), None),
        },
        "methods": rows,
        "tied": [row["label"] for row in rows if row.get("tied")],
        "ledger": facts["ledger"],
        "provenance": facts["provenance"],
    }
    report["advice"] = advise(report, scorer.higher_is_better)
    report["sentence"] = report["advice"]["sentence"]
    return report


def provisional(rates: int, ranking: Ranking) -> list[str]:
    """Why the order may not hold; empty where rates were searched and runs repeated."""
    told = []
    if rates == 1:
        told.append("made without a search for learning rates, which move a method further than methods lie apart")
    if not ranking.seeds_known:
        told.append("made on one seed: its intervals know of rows only")
    return told


def advise(report: Mapping[str, Any], higher_is_better: bool = True) -> Row:
    """One sentence: which method to take and why, never a winner where the test says tie; and the command."""
    judged = [row for row in report["methods"] if row["status"] == "judged"]
    sign = 1 if higher_is_better else -1
    helps = [row for row in judged if row["to_base"]["clear"] and sign * row["to_base"]["difference"] > 0]
    tied = [row for row in judged if row["tied"]]
    best = [row for row in tied if row in helps]
    if not best:
        base = wording.percent(report["base"]["value"])
        text = (
            f"No method is shown to do better than the base ({base}) on these {report['n']} test rows: "
            "tune none of them yet; more rows, to learn from or to judge by, come first."
        )
        return {"take": None, "sentence": text, "command": None}
    pick, reasons = choose(best)
    text = _alone(pick, judged) if len(tied) == 1 else _together(pick, tied, reasons)
    if report["provisional"]:
        text += " Provisional: " + "; ".join(report["provisional"]) + "."
    return {"take": pick["label"], "sentence": text, "command": command(pick)}


def choose(rows: Sequence[Row]) -> tuple[Row, list[str]]:
    """The cheapest of methods that tie, by the sum of its ranks in four costs; and what speaks for it."""
    costs: dict[str, Callable[[Row], float]] = {
        "bytes": lambda row: row["adapter_bytes"],
        "merge": lambda row: bool(row["not_merged"]),
        "time": lambda row: row["run_seconds"],
        "memory": lambda row: row["forgetting"]["low"] > 0 and row["forgetting"]["share"] > FORGETS,
    }
    ranks = {name: sorted({cost(row) for row in rows}) for name, cost in costs.items()}

    def place(row: Row, name: str) -> int:
        return ranks[name].index(costs[name](row))

    pick = min(rows, key=lambda row: (sum(place(row, name) for name in costs), row["adapter_bytes"]))
    words = {
        "bytes": f"has the smallest file ({size(pick['adapter_bytes'])})",
        "merge": "merges into the base",
        "time": "trains fastest",
        "memory": "forgets nothing measurable",
    }
    return pick, [words[name] for name in costs if len(ranks[name]) > 1 and place(pick, name) == 0]


def command(row: Row) -> str:
    """The overrides that repeat a method's best run."""
    options = " ".join(f"method.{key}={_yaml(value)}" for key, value in row["asked"].items() if key != "name")
    parts = ["luthier train TASK", f"method={row['asked']['name']}", options]
    return " ".join(filter(None, [*parts, f"train.learning_rate={row['learning_rate']:.2g}"]))


def size(count: float) -> str:
    """Bytes of a file: `2.1 MB`."""
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def _ranking(known: Mapping[str, Any], scorer: Scorer, metric: str, seed: int) -> Ranking:
    def scores(items: Any) -> list[Any]:
        return [item.scores[metric] for item in items]

    aggregate = None if type(scorer).aggregate is Scorer.aggregate else scorer.aggregate
    return rank(
        scores(known["base"]),
        {label: [scores(run) for run in runs] for label, runs in known["answers"].items()},
        clusters_of(known["base"]),
        aggregate=aggregate,
        higher_is_better=scorer.higher_is_better,
        seed=seed,
    )


def _row(
    label: str, about: Mapping[str, Any], standing: Standing, known: Mapping[str, Any], facts: Mapping[str, Any]
) -> Row:
    runs = [run for run in about["runs"] if run["status"] == "complete"]
    first = runs[0]
    losses = [run["dev_loss"] for run in runs]
    return {
        **_told(label, about),
        "status": "judged",
        "learning_rate": first["trial"]["rate"],
        "dev_loss": sum(losses) / len(losses),
        "dev_losses": losses,
        "score": _score(standing),
        "to_best": _gap(standing.to_best),
        "to_base": _gap(standing.to_base),
        "tied": standing.tied,
        "trainable": first["trainable"],
        "share": first["trainable"] / facts["parameters"],
        "adapter_bytes": first["adapter_bytes"],
        "steps": first["steps"],
        "step_seconds": sum(run["step_seconds"] for run in runs) / len(runs),
        "run_seconds": sum(run["seconds"] for run in runs) / len(runs),
        "speed": known["speed"][label],
        "forgetting": known["forgetting"][label],
        "adapters": [f"trials/{run['key']}/adapter" for run in runs],
    }


def _failed(label: str, about: Mapping[str, Any]) -> Row:
    diverged = next((run["why"] for run in about["runs"] if run["status"] == "diverged"), "")
    why = about["why"] or f"its full-length run diverged: {diverged}"
    return {**_told(label, about), "status": "refused" if about["search"] is None else "diverged", "why": why}


def _told(label: str, about: Mapping[str, Any]) -> Row:
    keys = ("title", "family", "not_merged", "memory", "bracket", "search", "asked")
    return {"label": label, "method": about["method"], **{key: about[key] for key in keys}}


def _score(standing: Standing) -> Row:
    return {
        "value": standing.value, "low": standing.low, "high": standing.high, "seeds": list(standing.seeds),
        "seed_share": standing.seed_share,
    }  # fmt: skip


def _gap(gap: Gap | None) -> Row | None:
    return None if gap is None else {**dataclasses.asdict(gap), "clear": gap.clear}


def _alone(pick: Row, judged: Sequence[Row]) -> str:
    score = pick["score"]
    low, high = wording.percent(score["low"]), wording.percent(score["high"])
    text = f"Take {pick['label']}: {wording.percent(score['value'])} ({low} to {high})"
    if len(judged) == 1:
        return f"{text}, the only method that was judged."
    second = judged[1]
    gap = second["to_best"]
    points = wording.points(abs(gap["difference"]), sign=False)
    least, most = sorted((abs(gap["low"]), abs(gap["high"])))
    between = f"{wording.points(least, sign=False)} to {wording.points(most, sign=False)}"
    return f"{text}, ahead of every other method; the next, {second['label']}, is {points} points behind ({between})."


def _together(pick: Row, tied: Sequence[Row], reasons: Sequence[str]) -> str:
    names = [f"{row['label']} ({wording.percent(row['score']['value'])})" for row in tied]
    why = f": of these it {listed(reasons)}" if reasons else ": nothing that was measured sets them apart"
    return f"On this task {listed(names)} tie; take {pick['label']}{why}."


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def _yaml(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
