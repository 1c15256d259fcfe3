"""Layouts of a row: recognised from its columns, shown to the user, and turned into an Example or into faults."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data import oasst, preferences
from luthier.data.columns import ANSWERS, CONTEXTS, METADATA, QUESTIONS, guess, written
from luthier.data.turns import Problems, check_text, conversation, kind, tools_of
from luthier.errors import Fault
from luthier.records import Example, Message, Origin
from luthier.registry import suggestion

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "qa", "text", "preference", "oasst")
COLUMNS = ("prompt", "answer", "system", "rejected")
ONE_ROW = 'one row a line, such as {"prompt": "...", "answer": "..."}'


@dataclass(frozen=True)
class Layout:
    """How a file's rows are read: `fields` says which column plays which part; `unused` columns are left out."""

    name: str
    fields: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = [f"{part} = {column}" if part != column else column for part, column in self.fields.items()]
        return f"{self.name} ({', '.join(shown)})" if shown else self.name


class Unrecognised(Exception):
    """No layout fits, or several do: `what` and the `remedy` to write."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def recognise(
    rows: Sequence[Mapping[str, Any]],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
) -> Layout:
    """Find the layout of a file from some of its rows; raise Unrecognised with what to write."""
    counts = Counter(tuple(row) for row in rows)
    names = dict.fromkeys(key for row in rows for key in row)
    if columns:
        layout = _named_columns(columns, names)
    elif format is not None and format not in FORMATS:
        raise Unrecognised(f"no format is called '{format}'", suggestion(format, FORMATS))
    else:
        usual = {key: value for row in rows if tuple(row) == counts.most_common(1)[0][0] for key, value in row.items()}
        layout = _by_names({key: value for key, value in usual.items() if key not in tags}, rows, format, tags)
    missing = [tag for tag in tags if tag not in names]
    if missing:
        raise Unrecognised(f"data.tags names '{missing[0]}', which is no column", suggestion(missing[0], names))
    used = {*layout.fields.values(), *tags, "tools", "functions"}
    return Layout(layout.name, layout.fields, tuple(name for name in names if name not in used))


def parse(
    row: Mapping[str, Any],
    layout: Layout,
    origin: Origin,
    *,
    tags: Sequence[str] = (),
    system: str | None = None,
    where: str = "",
) -> Example | list[Fault]:
    """Turn a row into an example; or all that is wrong with it, at `where` (its origin, where none is given)."""
    problems = Problems()
    messages, rejected = _READ[layout.name](row, layout.fields, problems)
    tools = tools_of(row.get("tools") or row.get("functions"), problems)
    told = {tag: _text(row, tag, problems) for tag in tags}
    if not problems:
        messages = _with_system(messages, _system(row, layout.fields, problems), system)
        _check_turns(messages, problems, needs_prompt=layout.name != "text")
    if problems:
        return [Fault(where or str(origin), what, remedy) for what, remedy in problems]
    return Example(messages, origin, rejected=rejected, tools=tools, tags=told)


def _named_columns(columns: Mapping[str, str], names: Mapping[str, Any]) -> Layout:
    """The layout that `data.columns` asks for."""
    for part, column in columns.items():
        if part not in COLUMNS:
            raise Unrecognised(f"data.columns has the unknown part '{part}'", suggestion(part, COLUMNS))
        if column not in names:
            raise Unrecognised(f"has no column '{column}' (data.columns.{part})", suggestion(column, names))
    for part in ("prompt", "answer"):
        if part not in columns:
            raise Unrecognised(f"data.columns has no '{part}'", f"known here: {', '.join(names)}")
    return Layout("columns", dict(columns))


def _by_names(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], format: str | None, tags: Sequence[str]
) -> Layout:
    """The layout whose columns a usual row has; with `format`, that one or nothing."""
    lower = {str(key).strip().lower(): key for key in row}
    for name, find in _FIND.items():
        if format in (None, name) and (fields := find(lower, row)):
            if name not in ("preference", "text", "oasst"):
                _refuse_unpaired(lower, row)
            return Layout(name, fields)
    if format == "qa" or format is None:
        return _question_answer(lower, rows, tags)
    raise Unrecognised(f"is not in the format '{format}': its columns are {_listed(row)}", _remedy(rows, tags))


def _preference(lower: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    return preferences.fields(lower)


def _messages(lower: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    return _pick(lower, messages="messages", system="system") if "messages" in lower else {}


def _sharegpt(lower: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    name = next((name for name in ("conversations", "conversation") if name in lower), "")
    return _pick(lower, messages=name, system="system") if name else {}


def _alpaca(lower: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    if not {"instruction", "output"} <= lower.keys():
        return {}
    return _pick(lower, prompt="instruction", input="input", answer="output", system="system", history="history")


def _prompt_completion(lower: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    if not {"prompt", "completion"} <= lower.keys():
        return {}
    return _pick(lower, prompt="prompt", answer="completion", system="system")


def _plain(lower: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    others = [key for name, key in lower.items() if name not in ("text", "title", *METADATA) and row[key] is not None]
    return {"text": lower["text"]} if "text" in lower and not others else {}


def _question_answer(lower: Mapping[str, str], rows: Sequence[Mapping[str, Any]], tags: Sequence[str]) -> Layout:
    """Exactly one known question column beside exactly one known answer column, and nothing that they need."""
    questions = [lower[name] for name in QUESTIONS if name in lower]
    answers = [lower[name] for name in ANSWERS if name in lower]
    contexts = [lower[name] for name in CONTEXTS if name in lower]
    if len(questions) == len(answers) == 1 and not contexts:
        return Layout("qa", {"prompt": questions[0], "answer": answers[0], **_pick(lower, system="system")})
    columns = _listed(lower.values())
    if not any(isinstance(value, str | int | float) for row in rows for value in row.values()):
        what = f"has no known layout: a row is {_sketch(rows[0])}, with no text of its own"
        raise Unrecognised(what, f"make its prompt and its answer from that, and write {ONE_ROW}")
    if contexts and questions and answers:
        what = f"the column '{contexts[0]}' would be left out ({columns}): is it part of the question?"
        raise Unrecognised(what, f"join it into the question's text, or leave it out with {written(guess(rows, tags))}")
    if not questions and not answers:
        what = f"has no known layout: none of its columns ({columns}) is known as a question or an answer"
    elif not questions:
        what = f"has the answers in '{answers[0]}', but which column is the question? ({columns})"
    elif not answers:
        what = f"has the questions in '{questions[0]}', but which column is the answer? ({columns})"
    else:
        what = f"has several columns that could be question or answer: {', '.join(questions + answers)}"
    raise Unrecognised(what, _remedy(rows, tags))


def _remedy(rows: Sequence[Mapping[str, Any]], tags: Sequence[str]) -> str:
    pair = guess(rows, tags)
    return f"write {written(pair)} with the columns you mean" if all(pair) else f"write {ONE_ROW}"


def _refuse_unpaired(lower: Mapping[str, str], row: Mapping[str, Any]) -> None:
    """KTO rows hold good and bad answers alike: learning from all of them would teach the bad ones."""
    for name in ("label", "kto_tag"):
        if name in lower and isinstance(row[lower[name]], bool):
            what = f"marks its answers as good or bad in '{lower[name]}': learning from all would teach the bad ones"
            raise Unrecognised(what, f"keep the rows where {lower[name]} is true, and drop that column")


def _sketch(value: Any, depth: int = 4) -> str:
    """The shape of a nested value: its keys, and the first entry of its lists."""
    if isinstance(value, Mapping) and value and depth:
        shown = [f'"{key}": {_sketch(inner, depth - 1)}' for key, inner in list(value.items())[:4]]
        return "{" + ", ".join(shown) + (", ...}" if len(value) > 4 else "}")
    if isinstance(value, list) and value and depth:
        return f"[{_sketch(value[0], depth - 1)}, ...]"
    return "..."


def _pick(lower: Mapping[str, str], **parts: str) -> dict[str, str]:
    return {part: lower[name] for part, name in parts.items() if name in lower}


def _listed(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


_FIND = {
    "oasst": oasst.fields,
    "preference": _preference,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _plain,
}
Turns = tuple[tuple[Message, ...], tuple[Message, ...] | None]


def _read_messages(row: Mapping[str, Any], fields: Mapping[str, str], problems: Problems) -> Turns:
    return conversation(row.get(fields["messages"]), fields["messages"], problems), None


def _read_pair(row: Mapping[str, Any], fields: Mapping[str, str], problems: Problems) -> Turns:
    """A question and an answer, each a text or a list of turns."""
    prompt = _turns(row, fields["prompt"], "user", problems)
    answer = _turns(row, fields["answer"], "assistant", problems)
    rejected = _turns(row, fields["rejected"], "assistant", problems) if "rejected" in fields else None
    return (*prompt, *answer), rejected


def _read_alpaca(row: Mapping[str, Any], fields: Mapping[str, str], problems: Problems) -> Turns:
    """Earlier rounds of `history`, then `instruction` and `input` joined by a line end."""
    turns: list[Message] = []
    history = row.get(fields.get("history", "")) or []
    for pair in history if isinstance(history, list) else [None]:
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
            turns += [Message("user", pair[0]), Message("assistant", pair[1])]
        else:
            problems.add("'history' must be a list of [question, answer]", '[["...", "..."]]')
    question = _text(row, fields["prompt"], problems)
    more = _text(row, fields["input"], problems) if row.get(fields.get("input", "")) is not None else ""
    answer = _text(row, fields["answer"], problems, answer=True)
    asked = f"{question}\n{more}" if question and more else question or more
    return (*turns, Message("user", asked), Message("assistant", answer)), None


def _read_text(row: Mapping[str, Any], fields: Mapping[str, str], problems: Problems) -> Turns:
    return (Message("assistant", _text(row, fields["text"], problems)),), None


def _read_preference(row: Mapping[str, Any], fields: Mapping[str, str], problems: Problems) -> Turns:
    return preferences.read(row, fields, problems)


_READ = {
    "oasst": oasst.read,
    "messages": _read_messages,
    "sharegpt": _read_messages,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_pair,
    "qa": _read_pair,
    "columns": _read_pair,
    "text": _read_text,
    "preference": _read_preference,
}


def _turns(row: Mapping[str, Any], column: str, role: str, problems: Problems) -> tuple[Message, ...]:
    value = row.get(column)
    if isinstance(value, list) and any(isinstance(turn, Mapping) for turn in value):
        return conversation(value, column, problems)
    return (Message(role, _text(row, column, problems, answer=role == "assistant")),)


def _text(row: Mapping[str, Any], column: str, problems: Problems, *, answer: bool = False) -> str:
    """A cell as text: numbers and truth values are written out, and so is an answer that is a JSON object."""
    value = row.get(column)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and math.isfinite(value):
        return str(value)
    if answer and isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, str):
        check_text(value, f"'{column}'", problems)
        return value
    if column not in row:
        problems.add(f"has no '{column}'", suggestion(column, row))
    else:
        problems.add(f"'{column}' must be a text, not {kind(value)}{_shown(value)}", "write it in quotes")
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return "" if value is None else f" ({text[:40] + '…' if len(text) > 40 else text})"


def _system(row: Mapping[str, Any], fields: Mapping[str, str], problems: Problems) -> str:
    column = fields.get("system")
    return _text(row, column, problems) if column and row.get(column) is not None else ""


def _with_system(messages: tuple[Message, ...], own: str, default: str | None) -> tuple[Message, ...]:
    """Put the row's own system message in front, else the task's, where the turns have none."""
    text = own or default
    if not text or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", text), *messages)


def _check_turns(messages: tuple[Message, ...], problems: Problems, *, needs_prompt: bool) -> None:
    """A conversation that can be learned from asks something and ends in an answer."""
    if not messages or messages[-1].role != "assistant":
        last = f"with a turn of '{messages[-1].role}'" if messages else "before it begins"
        problems.add(f"ends {last}: there is no answer to learn", "end the row with the assistant's answer")
    elif needs_prompt and not any(m.content.strip() or m.extra for m in messages[:-1]):
        problems.add("the prompt is empty", "fill it in, or leave the row out")
