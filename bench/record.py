"""Has luthier become slower beside its peers? `make bench` runs the short comparisons and compares with the record.

    python bench/record.py                                     run, compare; exit code 1 where a ratio fell by over 15 %
    python bench/record.py --record                            run three rounds, compare, and keep what was measured
    python bench/record.py --record docs/benchmarks/demo.json  keep the ratios of runs that were made before

What is recorded are ratios (docs/benchmarks/recorded.json), each for one class of machine: dtype, vector instructions,
cores. Seconds differ from machine to machine, and so do ratios between classes; on a class without a record nothing is
compared. A data set that is not here is passed over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gain import ratio
from rows import ROOT, there

RECORDED = ROOT / "docs" / "benchmarks" / "recorded.json"
ALLOWED = 0.15  # of a recorded ratio that may be lost
ARMS = ("trl_tuned", "luthier")
CASES = {  # data set: options of sft_vs_trl.py; together a few minutes on two cores
    "demo": ("--steps", "2", "--batch", "16"),
    "lamini_docs": ("--steps", "3", "--batch", "16"),
}
ROUNDS, ROUNDS_TO_RECORD = 1, 3


@dataclass(frozen=True)
class Finding:
    """One ratio beside its record; `recorded` is None where there is none for this class of machine."""

    case: str
    against: str
    ratio: float
    recorded: float | None

    @property
    def fell(self) -> bool:
        return self.recorded is not None and self.ratio < (1 - ALLOWED) * self.recorded

    def __str__(self) -> str:
        words = f"{self.case}: {self.ratio:.2f} times {self.against}"
        if self.recorded is None:
            return f"{words}; nothing is recorded for it"
        change = 100 * (self.ratio / self.recorded - 1)
        verdict = f"FELL by more than {100 * ALLOWED:.0f} %" if self.fell else "holds"
        return f"{words}, recorded {self.recorded:.2f} ({change:+.0f} %): {verdict}"


def machine_class(machine: Mapping[str, Any]) -> str:
    """What ratios depend on beside the code: `float32, AVX2, 2 cores`."""
    return f"{machine['dtype']}, {machine['capability']}, {machine['cores']} cores"


def compare(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Finding]:
    """Set the ratios of one comparison beside those recorded for its data and class of machine."""
    known = recorded.get(machine_class(measured["machine"]), {}).get(measured["data"], {})
    return [
        Finding(measured["data"], arm, value, known[arm]["ratio"] if arm in known else None)
        for arm, value in measured["summary"].get("ratios", {}).items()
    ]


def kept(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The record with one comparison's ratios in it; what was recorded for others stays."""
    key, data = machine_class(measured["machine"]), measured["data"]
    settings = {name: measured["settings"][name] for name in ("batch", "steps", "rounds")}
    new = {}
    for arm, value in measured["summary"].get("ratios", {}).items():
        seen = ratio(measured["runs"], "luthier", arm)
        new[arm] = {
            "ratio": value, "range": [round(seen["low"], 2), round(seen["high"], 2)], **settings,
            "date": measured["machine"]["date"],
        }  # fmt: skip
    mine = recorded.get(key, {})
    return {**recorded, key: {**mine, data: {**mine.get(data, {}), **new}}}


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """Run the short comparisons whose data are here."""
    for case, options in CASES.items():
        if not there(case):
            print(f"{case}: its data are not on this machine, passed over", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            command = [sys.executable, str(Path(__file__).parent / "sft_vs_trl.py"), "--data", case, *options]
            told = ["--rounds", str(rounds), "--arms", *ARMS, "--out", str(out)]
            if subprocess.run([*command, *told], check=False).returncode:
                raise SystemExit(f"{case}: the comparison failed")
            yield json.loads(out.read_text("utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or read, compare, and keep where asked; 1 where a ratio fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="kept comparisons instead of new runs")
    parser.add_argument("--record", action="store_true", help="keep the ratios as this class's record")
    parser.add_argument("--into", type=Path, default=RECORDED, help="the file of records")
    options = parser.parse_args(arguments)
    recorded = json.loads(options.into.read_text("utf-8")) if options.into.exists() else {}
    found: list[Finding] = []
    measured = (
        [json.loads(path.read_text("utf-8")) for path in options.files]
        if options.files
        else measure(ROUNDS_TO_RECORD if options.record else ROUNDS)
    )
    after, classes = dict(recorded), set()
    for one in measured:
        found += compare(recorded, one)
        classes.add(machine_class(one["machine"]))
        after = kept(after, one)
    print("\n".join(map(str, found)))
    for unknown in sorted(classes - recorded.keys()):
        print(
            f"Nothing is recorded for this class of machine ({unknown}): `make bench RECORD=1` keeps what it measures."
        )
    if options.record:
        options.into.write_text(json.dumps(after, indent=2) + "\n", "utf-8")
        print(f"Recorded in {options.into}")
        return 0
    return int(any(finding.fell for finding in found))


if __name__ == "__main__":
    sys.exit(main())
