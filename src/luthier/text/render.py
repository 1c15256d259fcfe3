"""Examples to token ids and loss weights, born together.

The one law of this page: `rendered.ids[:rendered.prompt_length] == render_prompt(example.prompt, ...)`. Training,
evaluation and serving see the same prompt: pieces are tokenised apart, and a prompt's pieces are its row's first.

Weights: 1 on every answer's tokens and its end token, 0 elsewhere; `Message.weight` overrides for its answer. What
stands after the last end token is dropped. A row without a prompt is plain text: BOS, text and end, trained whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from luthier.contracts import Piece, Template
from luthier.errors import DataError, Fault, LuthierError, SpecError
from luthier.records import Example, Message, Rendered
from luthier.text import marks, shorten
from luthier.text.tokenizer import Tokenizer

BLOCK = 256  # rows whose pieces are tokenised in one call
OVER_LONG = "tokens, the limit is"  # in every sentence about an over-long row
REMEDY = "shorten these rows, raise `data.max_length`, or choose `data.truncate: left|right|drop`"


@dataclass(frozen=True)
class Rendering:
    """Many rows: what became of each. `cut` says (example, tokens removed, where); `notes` counts remarks.

    `rendered` keeps the order of the examples, without those in `dropped` and `refused`. `remarks` are about the whole.
    """

    rendered: Sequence[Rendered] = field(default_factory=list)
    dropped: list[Example] = field(default_factory=list)
    cut: list[tuple[Example, int, str]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[Example, Fault]] = field(default_factory=list)  # left out: no template could render them
    remarks: list[str] = field(default_factory=list)


def render(
    example: Example,
    template: Template,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    truncate: str = "error",
) -> Rendered | None:
    """Render one example; None only where `truncate="drop"` drops it.

    An over-long row (more than `max_length` tokens) is a DataError, or with `truncate`:
    `left`: the oldest turns go first, then the start of the last question; the answer stays whole.
    `right`: the end of the last question goes; only if that is not enough, the answer's end, with its end token.
    System message and the template's own text always stay, and the cut row obeys the law with its cut prompt.
    """
    row, _ = _row(example, template, tokenizer)
    if max_length is None or len(row.ids) <= max_length:
        return row
    if truncate == "drop":
        return None
    if truncate == "error":
        raise DataError(_too_long(row, max_length), where=str(example.origin), remedy=REMEDY)
    return _cut(example, template, tokenizer, max_length, truncate)[0]


def render_all(
    examples: Iterable[Example],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    truncate: str = "error",
    *,
    skip: bool = False,
    keep: Callable[[Rendered], object] | None = None,
) -> Rendering:
    """Render many examples; raise one DataError that lists every row which cannot be.

    With `skip` rows that could not be rendered at any length are `refused` instead; over-long ones never are. `keep` is
    handed each row as it is made, and `rendered` stays empty: for more rows than should be in memory.
    """
    rows: list[Rendered] = []
    done, faults, take = Rendering(rows), [], keep or rows.append
    for example, drawn in _drawn(examples, template, tokenizer):
        try:
            row, notes = _row(example, template, tokenizer, drawn)
            for note in notes:
                done.notes[note] = done.notes.get(note, 0) + 1
            if max_length is None or len(row.ids) <= max_length:
                take(row)
            elif truncate == "drop":
                done.dropped.append(example)
            elif truncate == "error":
                faults.append(Fault(str(example.origin), _too_long(row, max_length)))
            else:
                shorter, where = _cut(example, template, tokenizer, max_length, truncate)
                take(shorter)
                done.cut.append((example, shorter.cut, where))
        except DataError as error:
            fault = Fault(error.where, error.what, error.remedy)
            if skip and OVER_LONG not in error.what:
                done.refused.append((example, fault))
            else:
                faults.append(fault)
    if faults:
        long = truncate == "error" and any(OVER_LONG in fault.what for fault in faults)
        raise DataError(f"{len(faults)} row(s) cannot be rendered", remedy=REMEDY if long else "", faults=faults)
    return done


def render_prompt(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: Template, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Token ids up to where the model speaks: what generation starts from, in evaluation and in serving."""
    if not messages:
        return tuple(tokenizer.encode(tokenizer.start))
    pieces = template.prompt(shielded(messages, tokenizer), shielded_tools(tools, tokenizer), tokenizer)
    ids = [number for part in encode_pieces(pieces, tokenizer) for number in part]
    _check_start(ids, tokenizer)
    return tuple(ids)


def shielded(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Message]:
    """Messages whose text cannot become control tokens (see `marks`)."""
    shown = []
    for message in messages:
        tokens = tokenizer.shields(message.role)
        content, extra = marks.mark(message.content, tokens), marks.mark(message.extra, tokens)
        shown.append(Message(message.role, content, message.weight, extra))
    return shown


def shielded_tools(tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[Mapping[str, Any]]:
    """Function schemas whose text cannot become control tokens."""
    return list(marks.mark(list(tools), tokenizer.shields("tool")))


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each piece, tokenised apart."""
    encoded, after = [], ""
    for piece in pieces:
        encoded.append(tokenizer.encode_marked(piece.text, after=after))
        after = piece.text or after
    return encoded


def _drawn(
    examples: Iterable[Example], template: Template, tokenizer: Tokenizer
) -> Iterator[tuple[Example, list[Piece] | LuthierError]]:
    """Each example with its pieces, or what speaks against it; a block's pieces are tokenised ahead, in one call.

    One call for many texts costs a quarter less than one for each, and uses all cores (docs/benchmarks/scale.json).
    """
    source = iter(examples)
    while block := list(islice(source, BLOCK)):
        drawn = [_pieces_or_why_not(example, template, tokenizer) for example in block]
        tokenizer.encode_ahead(text for one in drawn if isinstance(one, list) for text in _asked(one, tokenizer))
        yield from zip(block, drawn, strict=True)
    tokenizer.encode_ahead(())


def _pieces_or_why_not(example: Example, template: Template, tokenizer: Tokenizer) -> list[Piece] | LuthierError:
    try:
        _check_messages(example)
        return _pieces(example, template, tokenizer)
    except (DataError, SpecError) as error:
        return error


def _asked(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Iterator[str]:
    """The texts that `encode_pieces` will ask for."""
    after = ""
    for piece in pieces:
        yield from tokenizer.asked(piece.text, after=after)
        after = piece.text or after


def _row(
    example: Example, template: Template, tokenizer: Tokenizer, drawn: list[Piece] | LuthierError | None = None
) -> tuple[Rendered, list[str]]:
    """One example as ids and weights, whatever its length, with remarks for the user."""
    try:
        pieces = _pieces_or_why_not(example, template, tokenizer) if drawn is None else drawn
        if isinstance(pieces, LuthierError):
            raise pieces
        ids: list[int] = []
        weights: list[float] = []
        prompt_length = 0
        for piece, part in zip(pieces, encode_pieces(pieces, tokenizer), strict=True):
            prompt_length = len(ids)
            ids += part
            weights += [_weight(example, piece)] * len(part)
        notes = _rewritten(example, pieces)
    except DataError as error:
        raise DataError(error.what, where=_place(example, error), remedy=error.remedy, faults=error.faults) from None
    except SpecError as error:
        raise SpecError(
            f"{error.what} (first met at {example.origin})", where=error.where, remedy=error.remedy
        ) from None
    _check_start(ids, tokenizer)
    weights[0] = 0.0  # nothing stands before it that could predict it
    row = Rendered(tuple(ids), tuple(weights), prompt_length, example.id)
    _check_row(row, example, template, tokenizer)
    return row, notes


def _pieces(example: Example, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    messages = shielded(example.messages, tokenizer)
    if not example.prompt:
        return [Piece(tokenizer.start), Piece(messages[-1].content + tokenizer.ends[0], 0)]
    return template.pieces(messages, shielded_tools(example.tools, tokenizer), tokenizer)


def _weight(example: Example, piece: Piece) -> float:
    if piece.message is None:
        return 0.0
    told = example.messages[piece.message].weight
    return 1.0 if told is None else told


def _check_messages(example: Example) -> None:
    """Raise DataError for rows that cannot teach anything, with the cause."""
    if not example.messages or example.messages[-1].role != "assistant":
        raise DataError("does not end in an answer", remedy="the last message must be the assistant's")
    for index, message in enumerate(example.messages):
        if message.role != "assistant":
            if message.weight:
                raise DataError(f"message {index + 1} ({message.role}) has a weight", remedy="only answers are trained")
        elif message.weight != 0 and not message.content.strip() and not message.extra.get("tool_calls"):
            raise DataError(
                f"message {index + 1} is an empty answer: nothing to learn", remedy="fill it or leave the row out"
            )
    if all(message.weight == 0 for message in example.messages if message.role == "assistant"):
        raise DataError("nothing is supervised: every answer has weight 0", remedy="leave the row out")


def _rewritten(example: Example, pieces: Sequence[Piece]) -> list[str]:
    """Remarks on earlier answers that the template rewrites, so that only the last is trained."""
    shown = {piece.message for piece in pieces}
    lost = [i for i, m in enumerate(example.messages) if m.role == "assistant" and m.weight != 0 and i not in shown]
    if asked := [index + 1 for index in lost if example.messages[index].weight]:
        raise DataError(
            f"message(s) {asked} shall be trained, but the template rewrites earlier answers",
            remedy="write one row per answer, each ending in the answer to train",
        )
    note = "the template rewrites earlier answers: only the last is trained; for all, write one row per answer"
    return [note] if lost else []


def _check_row(row: Rendered, example: Example, template: Template, tokenizer: Tokenizer) -> None:
    if row.ids[-1] not in tokenizer.stop_ids:
        raise SpecError(
            f"the template '{template.name}' does not end an answer with an end token ({tokenizer.ends[0]})"
        )
    if not row.supervised:
        raise DataError("nothing is supervised", where=str(example.origin), remedy="leave the row out")
    assert row.supervised < len(row.ids), "something must stand before an answer"


def _check_start(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    if tokenizer.bos_id is not None and list(ids[:2]) == [tokenizer.bos_id] * 2:
        raise SpecError(
            f"the template writes {tokenizer.bos} twice at the start", remedy="take one out of the template"
        )


def _cut(
    example: Example, template: Template, tokenizer: Tokenizer, max_length: int, side: str
) -> tuple[Rendered, str]:
    """Shorten an over-long row from a side; return it with the words for what was cut."""

    def measured(shorter: Example) -> Rendered:
        return _row(shorter, template, tokenizer)[0]

    whole = measured(example)
    row, where = shorten.shorten(example, max_length, side, tokenizer.encode_with_offsets, measured)
    if row is None:
        raise DataError(
            f"has {len(whole.ids)} tokens, the limit is {max_length}, and {where} cannot be cut",
            where=str(example.origin),
            remedy="raise `data.max_length` or leave the row out",
        )
    return dataclasses.replace(row, example_id=example.id, cut=len(whole.ids) - len(row.ids)), where


def _too_long(row: Rendered, limit: int) -> str:
    return f"has {len(row.ids)} tokens, the limit is {limit} (answer {len(row.ids) - row.prompt_length})"


def _place(example: Example, error: LuthierError) -> str:
    return f"{example.origin} ({error.where})" if error.where else str(example.origin)
