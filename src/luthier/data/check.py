"""Everything worth knowing about a task's rows before a minute is spent on training, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data import near
from luthier.data.leaks import guard
from luthier.data.profile import (
    Lengths,
    asked,
    groups,
    near_groups,
    profile,
    said,
    scripts,
    templates_inside,
)
from luthier.data.read import Dataset, FileInfo
from luthier.errors import Fault
from luthier.records import Example

FAULT, WARNING, NOTE = "fault", "warning", "note"
SHOWN = 20  # origins that a finding lists
FEW_HELD = 100  # held-out rows below which an interval is wide
LOST = 0.01  # share of bad rows that is worth a warning
MAJORITY = 0.5
GROUPS = 10  # groups of duplicates that are spelt out


@dataclass(frozen=True)
class Finding:
    """One thing to know. `code` is stable; `count` rows are concerned, of which `origins` names the first."""

    severity: str
    code: str
    what: str
    origins: tuple[str, ...] = ()
    remedy: str = ""
    count: int = 0
    groups: tuple[tuple[str, ...], ...] = ()  # origins that belong together

    def as_dict(self) -> dict[str, Any]:
        return {
            "severity": self.severity,
            "code": self.code,
            "what": self.what,
            "count": self.count,
            "origins": list(self.origins),
            "groups": [list(group) for group in self.groups],
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class CheckReport:
    """All findings, worst first, and the profile of each side."""

    findings: list[Finding]
    sides: Mapping[str, dict[str, Any]]
    files: list[FileInfo] = field(default_factory=list)
    row_faults: list[Fault] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        """What keeps the task from being trained as it stands; empty means that `luthier check` ends with 0."""
        return [
            Fault(finding.origins[0] if finding.origins else "", finding.what, finding.remedy)
            for finding in self.findings
            if finding.severity == FAULT
        ]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; the keys are stable."""
        return {
            "ok": not self.faults,
            "files": [info.as_dict() for info in self.files],
            "sides": dict(self.sides),
            "findings": [finding.as_dict() for finding in self.findings],
            "bad_rows": [{"where": one.where, "what": one.what, "remedy": one.remedy} for one in self.row_faults],
        }


@dataclass(frozen=True)
class _Asked:
    """What the findings are looked for in."""

    parts: Mapping[str, Sequence[Example]]
    everything: Sequence[Example]
    lengths: Mapping[str, Lengths]
    limit: int | None
    truncate: str
    template: str
    special: Sequence[str]
    threshold: float


def check(
    parts: Dataset | Mapping[str, Sequence[Example]],
    *,
    files: Sequence[FileInfo] = (),
    faults: Sequence[Fault] = (),
    quarantined: Sequence[Example] = (),
    lengths: Mapping[str, Lengths] | None = None,
    limit: int | None = None,
    truncate: str = "error",
    template: str = "",
    special: Sequence[str] = (),
    threshold: float = near.THRESHOLD,
) -> CheckReport:
    """Look through all sides (`train`, `dev`, `test`, or one dataset as `all`).

    `lengths` holds tokens by example id and `limit` how many a row may have; `template` is the name of the one in use
    and `special` the texts of the tokenizer's control tokens; `faults` are rows that `on_bad: skip` left out.
    """
    if isinstance(parts, Dataset):
        files, faults, parts = parts.files, parts.faults, {"all": parts.examples}
    everything = [row for rows in parts.values() for row in rows]
    task = _Asked(parts, everything, lengths or {}, limit, truncate, template, special, threshold)
    found = [finding for look in LOOKS for finding in look(task)]
    found += [*_skipped(files, faults), *_quarantined(quarantined)]
    order = {FAULT: 0, WARNING: 1, NOTE: 2}
    found.sort(key=lambda finding: order[finding.severity])
    sides = {side: profile(rows, lengths) for side, rows in parts.items()}
    return CheckReport(found, sides, list(files), list(faults))


def _over_long(task: _Asked) -> Iterator[Finding]:
    """Rows beyond the limit: an error, or what will be cut from them and where."""
    if task.limit is None:
        return
    limit = task.limit
    known = [(row, task.lengths[row.id]) for row in task.everything if row.id in task.lengths]
    long = sorted(((row, n) for row, n in known if n.total > limit), key=lambda pair: -pair[1].total)
    if not long:
        return
    lost = sum(n.total - limit for _, n in long)
    fates = {
        "error": f"are longer than {limit} tokens",
        "left": f"lose the beginning of their prompt ({lost} tokens in all)",
        "right": f"lose the end of their prompt ({lost} tokens in all)",
        "drop": "are left out, being too long",
    }
    spelt = tuple(f"{row.origin} ({n.prompt} + {n.answer} tokens, {n.total - limit} too many)" for row, n in long)
    severity = FAULT if task.truncate == "error" else WARNING
    remedy = "raise data.max_length, shorten the rows, or choose data.truncate: left, right or drop"
    yield Finding(severity, "over_long", f"{len(long)} rows {fates[task.truncate]}", spelt[:SHOWN], remedy, len(long))
    bare = [row for row, n in long if n.answer >= limit]
    if bare and task.truncate in ("left", "right"):
        what = f"{len(bare)} answers alone are longer than {limit} tokens; an answer is never cut"
        remedy = "raise data.max_length, or choose data.truncate: drop"
        yield _finding(FAULT, "answer_over_long", what, bare, remedy)


def _empty(task: _Asked) -> Iterator[Finding]:
    empty = [row for row in task.everything if not row.answer.strip() and not row.messages[-1].extra]
    if empty:
        remedy = "fill them in or take them out, unless saying nothing is right"
        yield _finding(WARNING, "empty_answer", f"{len(empty)} answers are empty", empty, remedy)


def _duplicates(task: _Asked) -> Iterator[Finding]:
    same = groups(task.everything, said)
    if same:
        rows = sum(len(group) - 1 for group in same)
        what = f"{rows} rows repeat another one (question and answer are the same)"
        yield _grouped(WARNING, "duplicate", what, same, "keep one of each: repeated rows are learned by heart", rows)
    twice = [group for group in groups(task.everything, asked) if group[0].prompt and len({said(r) for r in group}) > 1]
    if twice:
        rows = sum(map(len, twice))
        what = f"{len(twice)} questions have different answers ({rows} rows)"
        remedy = "settle on one answer, unless several are right (then judge with a metric that allows it)"
        yield _grouped(WARNING, "contradiction", what, twice, remedy, rows)


def _near(task: _Asked) -> Iterator[Finding]:
    found = near_groups(task.everything, task.threshold)
    if not found:
        return
    rows = sum(map(len, found))
    what = f"{rows} rows in {len(found)} groups ask nearly the same (they are kept on one side of a split)"
    yield _grouped(NOTE, "near_duplicate", what, found, "add rows of other wording rather than more of these", rows)
    if len(found[0]) > 0.2 * len(task.everything) and len(task.everything) >= 50:
        share = len(found[0]) / len(task.everything)
        what = f"one chain of near duplicates holds {share:.0%} of all rows, so shares of a split may be far off"
        remedy = "name dev and test files of your own"
        yield _finding(WARNING, "giant_cluster", what, found[0], remedy)


def _same_answers(task: _Asked) -> Iterator[Finding]:
    """Reworded questions with one long answer: a random split would put some of them on both sides."""
    by_answer: dict[str, list[Example]] = {}
    for index, answer in near.telling_answers(task.everything).items():
        by_answer.setdefault(answer, []).append(task.everything[index])
    found = sorted((rows for rows in by_answer.values() if len({asked(r) for r in rows}) > 1), key=len, reverse=True)
    if found:
        rows = sum(map(len, found))
        what = f"{rows} rows share a long answer with a row that asks otherwise ({len(found)} answers)"
        remedy = "a split by row would leak them into the test; luthier's split keeps each group on one side"
        yield _grouped(WARNING, "same_answer", what, found, remedy, rows)


def _leaks(task: _Asked) -> Iterator[Finding]:
    leaks = guard(task.parts.get("train", ()), task.parts.get("dev", ()), task.parts.get("test", ()))
    if leaks:
        kinds = {kind: sum(leak.kind == kind for leak in leaks) for kind in dict.fromkeys(leak.kind for leak in leaks)}
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        what = f"{len(leaks)} training rows give held-out rows away ({listed})"
        remedy = "take them out of the training file; `luthier train` leaves them out and counts them"
        spelt = tuple(str(leak) for leak in leaks[:SHOWN])
        yield Finding(FAULT, "leak", what, spelt, remedy, len(leaks))


def _answers(task: _Asked) -> Iterator[Finding]:
    for side, rows in task.parts.items():
        top = profile(rows)["answers"]["top"] if rows else []
        if len(rows) >= 20 and top and top[0]["share"] >= MAJORITY and len(top) > 1:
            what = f"{top[0]['share']:.0%} of the {side} answers are {top[0]['answer'][:60]!r}"
            remedy = (
                "always saying so scores that much: compare with it, or judge with f1, which weighs the rare answers"
            )
            yield Finding(NOTE, "majority_answer", what, remedy=remedy, count=top[0]["rows"])


def _template(task: _Asked) -> Iterator[Finding]:
    for name, rows in templates_inside(task.everything).items():
        share = len(rows) / len(task.everything)
        if share < 0.5:
            what = f"{len(rows)} rows hold the marks of a prompt template ({name}) in their text"
            yield _finding(WARNING, "template_residue", what, rows, "take the marks out of the text")
        elif task.template == "raw":
            what = f"the data bring their own template ({name}), and `raw` adds none"
            yield _finding(NOTE, "template_inside", what, rows, "")
        else:
            what = f"a template is inside the data already ({name}, {share:.0%} of the rows): it would be wrapped twice"
            remedy = "write `template: raw`, which adds nothing but the end token, or take the marks out of the file"
            yield _finding(WARNING, "template_inside", what, rows, remedy)


def _control(task: _Asked) -> Iterator[Finding]:
    for token in task.special:
        rows = [row for row in task.everything if any(token in message.content for message in row.messages)]
        if token.strip() and rows:
            what = f"the control token {token!r} stands in the text of {len(rows)} rows (it is read as plain text)"
            yield _finding(WARNING, "control_token", what, rows, "take it out: it was left by another tool")


def _scripts(task: _Asked) -> Iterator[Finding]:
    main = {side: next(iter(scripts(rows)), "") for side, rows in task.parts.items() if rows}
    if len(set(main.values()) - {""}) > 1:
        what = "the sides are written in different scripts: " + ", ".join(f"{k} in {v}" for k, v in main.items())
        yield Finding(WARNING, "scripts", what, remedy="hold out rows of the language that is trained")


def _held_out(task: _Asked) -> Iterator[Finding]:
    for side in ("train", "dev", "test"):
        if side not in task.parts:
            continue
        count = len(task.parts[side])
        if not count:
            severity = FAULT if side == "train" else WARNING
            remedy = f"give more rows, a larger data.{side}, another data.seed, or a file of its own"
            yield Finding(severity, f"no_{side}", f"there are no {side} rows", remedy=remedy)
        elif side == "test" and count < FEW_HELD:
            what = (
                f"only {count} test rows: a score has an uncertainty of up to {98 / count**0.5:.0f} points either way"
            )
            yield Finding(WARNING, "few_test", what, remedy=f"hold out {FEW_HELD} or more", count=count)


LOOKS = (
    _held_out,
    _leaks,
    _over_long,
    _template,
    _control,
    _empty,
    _duplicates,
    _same_answers,
    _scripts,
    _near,
    _answers,
)


def _skipped(files: Sequence[FileInfo], faults: Sequence[Fault]) -> Iterator[Finding]:
    skipped, rows = sum(info.skipped for info in files), sum(info.rows for info in files)
    if skipped:
        severity = WARNING if skipped > LOST * (rows + skipped) else NOTE
        what = f"{skipped} of {rows + skipped} rows are bad and left out (data.on_bad: skip)"
        yield Finding(severity, "skipped", what, tuple(map(str, faults[:SHOWN])), "mend them to use them", skipped)
    for info in files:
        if info.passed_over:
            what = f"{info.path}: {info.passed_over} replies were deleted, refused or spam, and are passed over"
            yield Finding(NOTE, "passed_over", what)
        if info.unused:
            what = f"{info.path}: columns that play no part: {', '.join(info.unused[:12])}"
            yield Finding(NOTE, "unused_columns", what, remedy="name one in data.tags to slice the report by it")
        if not info.encoding.startswith("utf-8"):
            yield Finding(NOTE, "encoding", f"{info.path}: read as {info.encoding}", remedy="else name data.encoding")


def _quarantined(rows: Sequence[Example]) -> Iterator[Finding]:
    if rows:
        what = f"{len(rows)} new rows are near rows of different sides and are on none"
        yield _finding(WARNING, "quarantined", what, rows, "reword them, or leave them out")


def _finding(severity: str, code: str, what: str, rows: Sequence[Example], remedy: str) -> Finding:
    return Finding(severity, code, what, tuple(str(row.origin) for row in rows[:SHOWN]), remedy, len(rows))


def _grouped(
    severity: str, code: str, what: str, found: Sequence[Sequence[Example]], remedy: str, count: int
) -> Finding:
    spelt = tuple(tuple(str(row.origin) for row in group[:SHOWN]) for group in found[:GROUPS])
    return Finding(severity, code, what, tuple(group[0] for group in spelt), remedy, count, spelt)
