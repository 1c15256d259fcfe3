"""Guards: signs that answers are broken rather than wrong. Red ones stand above every score of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.records import Prediction
from luthier.text.words import words

# Share above which a guard is red (evaluation reference, section 2; the last two are ours).
LIMITS = {"empty": 0.05, "truncated": 0.10, "unparsed": 0.20, "repetition": 0.10, "echo": 0.10}
MEANING = {
    "empty": "no answer at all",
    "truncated": "cut off by the length limit",
    "unparsed": "no JSON that could be read",
    "repetition": "says the same again and again",
    "echo": "repeats the question",
}
REPEATED = 0.3  # share of duplicate 4-grams in one answer
LEAST_GRAMS = 5  # shorter answers cannot be called repetitive
ECHO_LENGTH = 20  # characters of a question that make an echo
SHOWN, SHOWN_LENGTH = 3, 600


def guards(predictions: Sequence[Prediction], shown: Sequence[Prediction] = ()) -> dict[str, dict[str, Any]]:
    """Share of answers that each guard catches, whether it is red, and up to three different raw outputs.

    Raw outputs come from `shown` where it has caught ones (dev rows, say), else from the judged answers themselves.
    """
    found = {}
    for name, caught in _GUARDS.items():
        told = [verdict for verdict in map(caught, predictions) if verdict is not None]
        if not told:
            continue
        share = sum(told) / len(told)
        outputs = dict.fromkeys(item.text[:SHOWN_LENGTH] for item in (*shown, *predictions) if caught(item))
        found[name] = {
            "share": share,
            "count": sum(told),
            "n": len(told),
            "limit": LIMITS[name],
            "red": share > LIMITS[name],
            "meaning": MEANING[name],
            "outputs": list(outputs)[:SHOWN] if share else [],
        }
    return found


def repetition(text: str) -> float:
    """Share of an answer's word 4-grams that it has said before."""
    tokens = words(text)
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= LEAST_GRAMS else 0.0


def _empty(item: Prediction) -> bool | None:
    return not item.text.strip()


def _truncated(item: Prediction) -> bool | None:
    return item.stop == "length"


def _unparsed(item: Prediction) -> bool | None:
    """None where no metric parses answers."""
    parsed = [score.parts["parsed"] for score in item.scores.values() if "parsed" in score.parts]
    return not all(parsed) if parsed else None


def _repetitive(item: Prediction) -> bool | None:
    """A gold answer that repeats itself excuses an answer that does no more."""
    share = repetition(item.text)
    return share > REPEATED and share > repetition(item.gold)


def _echo(item: Prediction) -> bool | None:
    question, answer, gold = (" ".join(text.split()).casefold() for text in (item.question, item.text, item.gold))
    return len(question) >= ECHO_LENGTH and question in answer and question not in gold


_GUARDS: dict[str, Callable[[Prediction], bool | None]] = {
    "empty": _empty,
    "truncated": _truncated,
    "unparsed": _unparsed,
    "repetition": _repetitive,
    "echo": _echo,
}
