"""Tools and tool calls in the shape that chat templates expect, and as text for templates that know none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.records import Message

# Names under which a message's reasoning travels; templates read the first, gpt-oss' reads the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


def as_dict(message: Message) -> dict[str, Any]:
    """A message for a chat template: no empty keys, tool calls as `{type, function: {name, arguments}}`.

    Arguments that are JSON in a string (OpenAI's shape) become a mapping, since templates write them as JSON
    themselves and would quote them twice.
    """
    told = {key: value for key, value in message.as_dict().items() if value is not None}
    reasoning = next((told[key] for key in REASONING if key in told), None)
    if reasoning is not None:
        told = {"thinking": reasoning, **told, "reasoning_content": reasoning}
    if calls := told.get("tool_calls"):
        told["tool_calls"] = [_call(call) for call in calls]
    return told


def schemas(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Function schemas as `{type: function, function: ...}`; None when there are none, as transformers passes it."""
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools
    ] or None


def spoken(message: Message) -> str:
    """A message as text alone: its content, then each tool call as one line of JSON."""
    calls = [_call(call)["function"] for call in message.extra.get("tool_calls") or ()]
    lines = [json.dumps({k: c.get(k) for k in ("name", "arguments")}, ensure_ascii=False) for c in calls]
    return "\n".join([*([message.content] if message.content or not lines else []), *lines])


def listing(tools: Sequence[Mapping[str, Any]]) -> str:
    """Function schemas as text: one line of JSON each."""
    return "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in schemas(tools) or ())


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        return {"type": "function", "function": {"name": "", "arguments": call}}
    told = dict(call) if isinstance(call.get("function"), Mapping) else {"type": "function", "function": dict(call)}
    function = dict(told["function"])
    function["arguments"] = _arguments(function.get("arguments", {}))
    return {**told, "function": function}


def _arguments(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except ValueError:
        return value  # not JSON: the template shows it as it is
    return read if isinstance(read, dict) else value
