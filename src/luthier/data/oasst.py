"""Conversation trees of Open Assistant (`*.trees.jsonl`): one conversation a tree, the best-ranked reply at each turn.

A reply that people ranked goes before one that nobody did, rank 0 first; unranked ones by their date, then as they
stand. Replies that were deleted, or that reviewers refused or called spam, are passed over and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.data.turns import Problems, check_text, kind
from luthier.records import Message

ROLES = {"prompter": "user", "assistant": "assistant"}
SPAM = 0.5  # share of reviewers from which on a message counts as spam
SHAPE = '{"message_tree_id": ..., "prompt": {"role": "prompter", "text": ..., "replies": [...]}}'


def fields(lower: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    """The column that holds the tree; empty where a row is none."""
    root = row.get(lower.get("prompt", ""))
    if isinstance(root, Mapping) and ("replies" in root or root.get("role") == "prompter"):
        return {"tree": lower["prompt"]}
    return {}


def read(row: Mapping[str, Any], fields: Mapping[str, str], problems: Problems) -> tuple[tuple[Message, ...], None]:
    """The tree's conversation, up to its last answer; everything wrong with the turns on it is added to `problems`."""
    node, place = row.get(fields["tree"]), fields["tree"]
    if not isinstance(node, Mapping):
        problems.add(f"'{place}' must be a tree of messages, not {kind(node)}", SHAPE)
        return (), None
    if reason := _unfit(node):
        problems.add(f"its first message is {reason}", "leave the tree out")
        return (), None
    turns: list[Message] = []
    while node is not None:
        turns.append(_turn(node, place, problems))
        replies = _replies(node, place, problems)
        best = _best(replies)
        node = None if best is None else replies[best]
        place = f"{place}.replies[{best}]"
    while turns and turns[-1].role == "user":
        turns.pop()
    if not turns and not problems:
        problems.add("nobody has answered its first message", "leave the tree out")
    return tuple(turns), None


def passed_over(row: Mapping[str, Any], fields: Mapping[str, str]) -> int:
    """How many replies beside the chosen ones were deleted, refused or spam."""
    count, node = 0, row.get(fields["tree"])
    while isinstance(node, Mapping):
        replies = _replies(node, "", Problems())
        count += sum(bool(_unfit(reply)) for reply in replies)
        best = _best(replies)
        node = None if best is None else replies[best]
    return count


def _replies(node: Mapping[str, Any], place: str, problems: Problems) -> list[Mapping[str, Any]]:
    found = node.get("replies") or []
    if isinstance(found, list) and all(isinstance(reply, Mapping) for reply in found):
        return found
    problems.add(f"{place}.replies must be a list of messages", SHAPE)
    return []


def _best(replies: list[Mapping[str, Any]]) -> int | None:
    fit = [index for index, reply in enumerate(replies) if not _unfit(reply)]
    return min(fit, key=lambda index: _order(replies, index), default=None)


def _turn(node: Mapping[str, Any], place: str, problems: Problems) -> Message:
    role, text = node.get("role"), node.get("text")
    if role not in ROLES:
        problems.add(f"{place} has the unknown role '{role}'", f"known: {', '.join(ROLES)}")
    if not isinstance(text, str):
        problems.add(f"{place}.text must be a text, not {kind(text)}", "write it in quotes")
        return Message(ROLES.get(str(role), ""), "")
    check_text(text, f"{place}.text", problems)
    return Message(ROLES.get(str(role), ""), text)


def _order(replies: list[Mapping[str, Any]], index: int) -> tuple[float, str, int]:
    """Rank, then date, then place: the least is the best."""
    rank, date = replies[index].get("rank"), replies[index].get("created_date")
    ranked = isinstance(rank, int | float) and not isinstance(rank, bool)
    return float(rank) if ranked else float("inf"), date if isinstance(date, str) else "", index  # type: ignore[arg-type]


def _unfit(node: Mapping[str, Any]) -> str:
    """Why a message is not to be learnt from; empty where it is."""
    if node.get("deleted") is True:
        return "deleted"
    if node.get("review_result") is False:
        return "refused by its reviewers"
    labels = node.get("labels")
    spam = labels.get("spam") if isinstance(labels, Mapping) else None
    value = spam.get("value") if isinstance(spam, Mapping) else None
    return "spam" if isinstance(value, int | float) and value >= SPAM else ""
