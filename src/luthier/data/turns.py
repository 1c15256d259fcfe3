"""Turns of a conversation, in the shapes people write them: OpenAI, ShareGPT, Anthropic, with tool calls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.records import Message
from luthier.registry import suggestion

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant",
    "tool_call": "assistant",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles whose text is a call
SAME = {"from": "role", "value": "content"}  # ShareGPT's names
WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss", "train")
KEPT = ("name", "tool_call_id", "reasoning_content")
KEYS = ("role", "content", "from", "value", "tool_calls", "function_call", *WEIGHTS, *KEPT)
PARTS = ("text", "input_text", "output_text", "reasoning", "thinking", "tool_call", "tool_use", "tool_result")


class Problems(list[tuple[str, str]]):
    """What is wrong with a row: (what, remedy), all of it."""

    def add(self, what: str, remedy: str = "") -> None:
        self.append((what, remedy))


def conversation(raw: Any, place: str, problems: Problems) -> tuple[Message, ...]:
    """Read a list of turns found under a key of a row; everything wrong with it is added to `problems`."""
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        raw = _json_of(raw)  # tables keep lists as text
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        problems.add(f"'{place}' must be a list of turns, not {kind(raw)}", '[{"role": "user", "content": "..."}, ...]')
        return ()
    turns: list[Message] = []
    for index, one in enumerate(raw):
        turns += turn(one, f"{place}[{index}]", problems)
    return tuple(turns)


def turn(raw: Any, place: str, problems: Problems) -> list[Message]:
    """Read one turn (an Anthropic turn with several tool results becomes several)."""
    if not isinstance(raw, Mapping):
        problems.add(f"{place} must be an object, not {kind(raw)}", '{"role": "user", "content": "..."}')
        return []
    known: dict[str, Any] = {str(SAME.get(key, key)): value for key, value in raw.items() if value is not None}
    for key in raw:
        if key not in KEYS and raw[key] not in (None, [], {}):
            problems.add(f"{place} has the unknown key '{key}'", suggestion(str(key), KEYS))
    told = known.get("role")
    role = ROLES.get(str(told).lower(), "")
    if not role:
        what = f"has the unknown role '{told}'" if told is not None else "has no role"
        problems.add(f"{place} {what}", suggestion(str(told), ROLES) if told is not None else "add role or from")
        return []
    extra = {key: known[key] for key in KEPT if key in known}
    text, calls, results = _content(known.get("content"), place, problems)
    calls += _calls(known, place, problems)
    if str(told).lower() in CALLS:
        text, calls = "", calls + _call_of(text, place, problems)
    if "reasoning" in results:
        extra["reasoning_content"] = results["reasoning"]
    if calls:
        extra["tool_calls"] = calls
    elif known.get("content") is None:
        problems.add(f"{place} has no content", "add the text, or take the turn out")
    check_text(text, f"{place}.content", problems)
    if extra:
        check_text(json.dumps(extra, ensure_ascii=False, default=str), place, problems)
    tools = [Message("tool", str(answer), None, {"tool_call_id": key}) for key, answer in results.get("tools", ())]
    own = Message(role, text, _weight(known, place, problems), extra)
    return [*tools, own] if text or calls or not tools else tools


def check_text(text: str, place: str, problems: Problems) -> None:
    """Refuse what no tokenizer can take: NUL, and halves of characters."""
    if "\0" in text:
        problems.add(f"{place} has a NUL character", "take it out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        problems.add(f"{place} has half a character ({code}, a lone surrogate)", "write the whole character")


def tools_of(raw: Any, problems: Problems) -> tuple[Mapping[str, Any], ...]:
    """Function schemas, as a list or as its JSON text; bare functions are wrapped as OpenAI's."""
    if not raw:
        return ()
    found = _json_of(raw) if isinstance(raw, str) else raw
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        problems.add("'tools' must be a list of function schemas", '[{"type": "function", "function": {"name": ...}}]')
        return ()
    check_text(json.dumps(found, ensure_ascii=False, default=str), "'tools'", problems)
    return tuple(tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in found)


def kind(value: Any) -> str:
    """The name of a value's type, as a person who writes JSON knows it."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _content(raw: Any, place: str, problems: Problems) -> tuple[str, list[Any], dict[str, Any]]:
    """The text, the calls and the rest (reasoning, tool results) of a content: a text or a list of parts."""
    if raw is None or isinstance(raw, str):
        return raw or "", [], {}
    if not isinstance(raw, list):
        problems.add(f"{place}.content must be a text, not {kind(raw)}", "write it in quotes")
        return "", [], {}
    texts: list[str] = []
    calls: list[Any] = []
    rest: dict[str, Any] = {}
    for part in raw:
        sort = part.get("type", "text") if isinstance(part, Mapping) else None
        value = part.get("text", part.get("value", part.get("thinking"))) if isinstance(part, Mapping) else part
        if sort in ("tool_use", "tool_result") and isinstance(part, Mapping):
            _anthropic(part, calls, rest, place, problems)
        elif sort not in PARTS or not isinstance(value, str):
            problems.add(f"{place}.content has a part of type {sort!r}", "luthier learns from text: take the part out")
        elif sort == "tool_call":
            calls += _call_of(value, place, problems)
        elif sort in ("reasoning", "thinking"):
            rest["reasoning"] = rest.get("reasoning", "") + value
        else:
            texts.append(value)
    return "".join(texts), calls, rest


def _anthropic(part: Mapping[str, Any], calls: list[Any], rest: dict[str, Any], place: str, problems: Problems) -> None:
    """A tool_use or a tool_result block."""
    if part["type"] == "tool_use":
        call = {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
        calls += _calls({"tool_calls": [call]}, place, problems)
        return
    text, _, _ = _content(part.get("content"), place, problems)
    check_text(text, place, problems)
    rest.setdefault("tools", []).append((part.get("tool_use_id"), text))


def _calls(known: Mapping[str, Any], place: str, problems: Problems) -> list[Any]:
    """Tool calls in OpenAI's shape, arguments as an object (what chat templates expect)."""
    raw = known.get("tool_calls") or []
    if "function_call" in known:
        raw = [*raw, known["function_call"]] if isinstance(raw, list) else raw
    if not isinstance(raw, list):
        problems.add(f"{place}.tool_calls must be a list, not {kind(raw)}")
        return []
    calls = []
    for one in raw:
        function = one.get("function", one) if isinstance(one, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problems.add(f"{place} has a tool call without a name", '{"function": {"name": ..., "arguments": {...}}}')
            continue
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json_of(arguments)
        if not isinstance(arguments, Mapping):
            problems.add(f"{place} calls '{function['name']}' with arguments that are not a JSON object")
            continue
        call = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        calls.append({"id": one["id"], **call} if one.get("id") else call)
    return calls


def _call_of(text: str, place: str, problems: Problems) -> list[Any]:
    """The calls that a ShareGPT `function_call` turn writes as JSON."""
    value = _json_of(text)
    return _calls({"tool_calls": value if isinstance(value, list) else [value]}, place, problems)


def _weight(known: Mapping[str, Any], place: str, problems: Problems) -> float | None:
    """The row's own wish for the turn's loss; peers call it weight, loss_weight, loss_scale, loss or train."""
    weights = {}
    for key in WEIGHTS:
        value = known.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            weights[key] = float(value)
        elif value is not None:
            problems.add(f"{place}.{key} must be a number, not {value!r}", "0: not learned, 1: learned")
    if len(set(weights.values())) > 1:
        problems.add(f"{place} has weights that disagree ({', '.join(weights)})", "keep one")
    return next(iter(weights.values()), None)


def _json_of(text: str) -> Any:
    """A JSON text's value, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
