"""Peak memory of reading a file that is larger than it: generate rows, stream them, print both sizes as JSON.

    python bench/stream_memory.py [--gigabytes 2] [--buffer 10000] [--folder DIR]

The file is written to a temporary folder and removed. `resident_growth` is what the process grew by beyond its size
before the first row; `resumed_seconds` is what it takes to go on from a saved position in the middle of the file.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from luthier.data.stream import Stream
from luthier.training import peak

WORDS = Path(__file__).read_text("utf-8").split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file (10^9 bytes)")
    parser.add_argument("--buffer", type=int, default=10_000, help="rows of the shuffle buffer")
    parser.add_argument("--folder", type=Path, default=None, help="where the file is written for the time being")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = Path(folder) / "rows.jsonl"
        rows = generate(path, int(asked.gigabytes * 1e9))
        print(json.dumps(measure(path, rows, asked.buffer), indent=2))


def generate(path: Path, size: int) -> int:
    """Write rows of about a kilobyte until the file has its size; return how many."""
    generator, rows = random.Random(0), 0
    blocks = [" ".join(generator.choices(WORDS, k=140)) for _ in range(500)]
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < size:
            row = {"question": f"{rows} {generator.choice(blocks)}", "answer": f"answer {rows}"}
            written += file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def measure(path: Path, rows: int, buffer: int) -> dict[str, object]:
    """Read one whole epoch, stop and go on in the middle of the next, and say what it took."""
    stream = Stream([path], buffer=buffer, seed=0)
    before, began = peak.resident(), time.monotonic()
    answers = sum(int(next(stream).answer.split()[1]) for _ in range(rows))
    seconds, grown = time.monotonic() - began, peak.resident() - before
    assert answers == rows * (rows - 1) // 2, "an epoch gives every row once"
    for _ in range(rows // 2):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    expected = [next(stream).id for _ in range(100)]
    again, began = Stream([path], buffer=buffer, seed=0), time.monotonic()
    again.restore(state)
    resumed = time.monotonic() - began
    assert [next(again).id for _ in range(100)] == expected, "a restored stream goes on identically"
    return {
        "file_bytes": path.stat().st_size,
        "rows": rows,
        "buffer_rows": buffer,
        "resident_before": before,
        "resident_growth": grown,
        "resident_growth_over_file": round(grown / path.stat().st_size, 4),
        "rows_per_second": round(rows / seconds),
        "state_bytes": len(json.dumps(state)),
        "resumed_seconds": round(resumed, 2),
    }


if __name__ == "__main__":
    main()
