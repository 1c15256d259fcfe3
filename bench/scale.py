"""What a row costs on its way to a step, at a thousand rows and at a million: seconds and memory, as JSON.

    python bench/scale.py [--rows 1000 10000 100000] [--model tiny] [--out docs/benchmarks/scale.json]

Rows are made up: twelve random words are asked, three are answered. Each number of rows is measured in a process of its
own, in turns with the others (`--rounds`), on one thread, with the template `plain`; seconds are processor seconds, and
medians of the rounds. Stages that see every row (read, split, guard against leaks, tokenise, reopen what was tokenised)
are also given per row; a step, a resumed step and the first step of an epoch, which draws its order, as they are.
`--quick` leaves split and guard out; `--feed` starts from made-up ids, for what follows the tokenising alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

SIZES = (1_000, 10_000, 100_000)
STEPS = 50  # of which a median is taken
BATCH, BUDGET = 32, 8192
PER_ROW = ("read", "split", "guard", "tokenise", "reopen", "write", "verify")  # stages that see every row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model", default="tiny", help="whose tokenizer")
    parser.add_argument("--quick", action="store_true", help="leave out the split and the search for leaks")
    parser.add_argument("--feed", action="store_true", help="only what follows the tokenising")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        clock = Clock(asked.one)
        clock("import_arrow", lambda: __import__("pyarrow"))
        rows = made_up(asked.folder, clock) if asked.feed else tokenised(asked.folder, asked.model, asked.quick, clock)
        steps(rows, clock)
        print(json.dumps(clock.told))
        return
    told = {**circumstances(asked), "rows": {str(rows): by_size for rows, by_size in compare(asked).items()}}
    text = json.dumps(told, indent=2) + "\n"
    print(text, end="")
    if asked.out:
        asked.out.write_text(text, "utf-8")


def circumstances(asked: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and settings."""
    import numpy
    import pyarrow
    import tokenizers

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in (numpy, pyarrow, tokenizers)},
        "settings": {"model": asked.model, "template": "plain", "batch_size": BATCH, "tokens_per_pack": BUDGET},
        "rounds": asked.rounds,
    }


def compare(asked: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Every size in every round, each in a fresh process; medians by size."""
    found: dict[int, list[dict[str, Any]]] = {rows: [] for rows in asked.rows}
    for _ in range(asked.rounds):
        for rows in asked.rows:
            with tempfile.TemporaryDirectory() as folder:
                if not asked.feed:
                    generate(Path(folder) / "rows.jsonl", rows)
                told = [sys.executable, __file__, "--one", str(rows), "--folder", folder, "--model", asked.model]
                threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
                flags = [f"--{flag}" for flag in ("quick", "feed") if getattr(asked, flag)]
                done = subprocess.run(
                    [*told, *flags], env=os.environ | threads, check=True,
                    stdout=subprocess.PIPE,
                )  # fmt: skip
                found[rows].append(json.loads(done.stdout))
    return {rows: {key: statistics.median(one[key] for one in told) for key in told[0]} for rows, told in found.items()}


def generate(path: Path, rows: int) -> None:
    """Write rows of about a hundred characters."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            row = {"question": " ".join(draw.choices(words, k=12)), "answer": " ".join(draw.choices(words, k=3))}
            file.write(json.dumps(row) + "\n")


def tokenised(folder: Path, model: str, quick: bool, clock: Clock) -> Any:
    """Rows from a file to kept tokens, as a run has them."""
    from luthier import registry
    from luthier.data.leaks import guard
    from luthier.data.read import read
    from luthier.data.split import split
    from luthier.model import catalog
    from luthier.text.kept import render_kept
    from luthier.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(catalog.locate(model))
    template = registry.make("templates", "plain", "template")
    before = anonymous()
    examples = clock("read", lambda: read([folder / "rows.jsonl"]).examples)
    clock.told["examples_memory_bytes"] = anonymous() - before
    if not quick:
        sides = clock("split", lambda: split(examples, dev=0.1, test=0.15, seed=0))
        clock("guard", lambda: guard(sides.train, sides.dev, sides.test))

    def render() -> Any:
        return render_kept(examples, template, tokenizer, 2048, folder=folder / "tokens", at_least=1)

    before = anonymous()
    clock("tokenise", render)
    clock.told["tokenise_memory_bytes"] = anonymous() - before
    clock.told["file_bytes_a_row"] = sum(p.stat().st_size for p in (folder / "tokens").rglob("*.arrow")) / clock.rows
    return clock("reopen", render).rendered


def made_up(folder: Path, clock: Clock) -> Any:
    """Rows of a hundred ids that nobody tokenised, written and mapped."""
    from luthier import store
    from luthier.records import Rendered
    from luthier.text.kept import ROWS, Kept, Writer

    draw = random.Random(0)
    ids = [tuple(draw.randrange(49_152) for _ in range(100)) for _ in range(1000)]

    def fill(staging: Path) -> None:
        with Writer(staging / ROWS) as file:
            for index in range(clock.rows):
                file.append(Rendered(ids[index % 1000], (0.0,) * 80 + (1.0,) * 20, 80, f"{index:016x}"))

    before = anonymous()
    clock("write", lambda: store.publish_folder(folder / "tokens", fill))
    clock.told["write_memory_bytes"] = anonymous() - before
    clock("verify", lambda: store.verify_folder(folder / "tokens"))
    return clock("open", lambda: Kept.open(folder / "tokens" / ROWS))


def steps(rendered: Any, clock: Clock) -> None:
    """The feed: its start, an epoch's order, a step in the middle, and going on from a checkpoint."""
    from luthier.training.feed import ShuffledFeed

    def make() -> ShuffledFeed:
        return ShuffledFeed(rendered, batch_size=BATCH, seed=0, epochs=3, budget=BUDGET)

    before = anonymous()
    feed = clock("feed_start", make)
    clock("first_step", lambda: next(feed))
    clock.told["step_seconds"] = statistics.median(clock.time(lambda: next(feed))[0] for _ in range(STEPS))
    borders = [epoch * feed.steps_per_epoch for epoch in (1, 2, 1, 2)]  # at each of which an order is drawn
    clock.told["first_step_of_an_epoch_seconds"] = statistics.median(
        clock.time(partial(feed.batch, n))[0] for n in borders
    )
    state = json.loads(json.dumps(feed.state()))
    again = make()

    def resume() -> None:
        again.restore(state)
        next(again)

    clock("resumed_step", resume)
    clock.told["memory_of_feed_bytes"] = anonymous() - before
    clock.told["state_bytes"] = len(json.dumps(state))
    clock.told["resident_bytes"] = memory("VmRSS")
    clock.told["anonymous_bytes"] = anonymous()


class Clock:
    """Seconds of named stages; `told` also has each per row, in microseconds, where the stage sees every row."""

    def __init__(self, rows: int) -> None:
        self.rows, self.told = rows, dict[str, Any]()

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        seconds, made = self.time(work)
        self.told[f"{name}_seconds"] = seconds
        if name in PER_ROW:
            self.told[f"{name}_microseconds_a_row"] = seconds / self.rows * 1e6
        return made

    @staticmethod
    def time(work: Callable[[], Any]) -> tuple[float, Any]:
        """Processor seconds of this process: other programs on the machine do not count."""
        began = time.process_time()
        made = work()
        return time.process_time() - began, made


def anonymous() -> int:
    """Bytes that are this process's own: mapped files, which the system may drop at any time, do not count."""
    return memory("RssAnon")


def memory(entry: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


if __name__ == "__main__":
    main()
