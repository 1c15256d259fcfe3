"""Run chat templates, which come with models from strangers, where they can do no harm.

Jinja's immutable sandbox keeps a template from the interpreter; this page keeps it from the clock and the memory.
Loops, calls, filters, sums and literals are paid for from a budget; methods and filters are allow-listed; no value may
outgrow `LARGEST`. (Jinja's own sandbox bounds one `range`, not two nested ones.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date
from functools import lru_cache
from itertools import chain
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.runtime import Undefined

from luthier.errors import DataError, LuthierError, SpecError

LARGEST = 256 * 1024  # characters of a template, and of one value beyond what the conversation brings
LONGEST = 1024 * 1024  # characters of one rendered text beyond that
STEPS = 200_000  # iterations, calls and filters of one rendering
LITERALS = 64 * 1024 * 1024  # characters of template text that loops and macros may copy
SECONDS = 1.0  # of this thread's processor time
TODAY = date(2024, 7, 26)  # what Llama 3's own template falls back to: a prompt must not change overnight


class Exhausted(SecurityError):
    """A template asked for more than its budget."""


class Refused(TemplateError):
    """The template itself raised: it does not take this conversation."""


class Budget:
    """What one rendering may still spend; `content` is the size of what it is given."""

    def __init__(self, content: int, template: int, today: date) -> None:
        self.largest = LARGEST + 8 * content
        self.output = LONGEST + 8 * content
        self.steps, self.literals = STEPS + content, LITERALS
        self.template, self.today = template, today
        self.deadline = time.thread_time() + SECONDS + 1e-6 * content

    def spend(self, steps: int = 1, literals: int = 0) -> None:
        """Pay for work; raise Exhausted when the budget or the time is used up."""
        self.steps -= steps
        self.literals -= literals
        if self.steps < 0 or self.literals < 0:
            raise Exhausted("the template loops too long")
        if time.thread_time() > self.deadline:
            raise Exhausted(f"the template takes more than {SECONDS:g} s for one conversation")

    def show(self, size: int) -> None:
        """Pay for text that is printed."""
        self.output -= size
        if self.output < 0:
            raise Exhausted("the template prints too much")

    def measure(self, value: Any, strict: bool = False) -> int:
        """Size of a value as text would show it, at most `largest`; `strict` admits plain data only."""
        size, stack = 0, [value]
        while stack:
            item = stack.pop()
            size += 1
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, Mapping):
                size += len(item)
                stack += chain.from_iterable(item.items())
            elif isinstance(item, (list, tuple)):
                size += len(item)
                stack += item if size <= self.largest else ()
            elif isinstance(item, int):
                size += self.fits(item.bit_length() <= 4096)
            elif strict and not isinstance(item, (float, type(None), Undefined)):
                raise SecurityError(f"a template may not print a {type(item).__name__}")
            self.fits(size <= self.largest)
        return size

    def fits(self, true: bool) -> int:
        """Raise Exhausted unless a size that is about to arise is allowed; return 0."""
        if not true:
            raise Exhausted("the template makes a value that is too large")
        return 0


_spending: ContextVar[Budget] = ContextVar("spending")


def budget() -> Budget:
    """The budget of the rendering that runs."""
    return _spending.get()


@lru_cache(64)
def _compiled(source: str, name: str) -> jinja2.Template:
    from luthier.text import _jinja

    if len(source) > LARGEST:
        raise SpecError(f"the template has {len(source)} characters, at most {LARGEST} are read", where=name)
    try:
        return _jinja.ENVIRONMENT.from_string(source)
    except TemplateSyntaxError as error:
        raise SpecError(f"is not a valid Jinja template: {error.message}", where=f"{name}:{error.lineno}") from None
    except (RecursionError, SyntaxError, MemoryError, ValueError, OverflowError) as error:
        raise SpecError(f"cannot be compiled ({type(error).__name__})", where=name, remedy="nest it less") from None


def check(source: str, name: str = "chat template") -> None:
    """Compile a template and forget it; raise SpecError with the line of what is wrong."""
    _compiled(source, name)


def render(source: str, variables: Mapping[str, Any], *, name: str = "chat template", today: date = TODAY) -> str:
    """Render a template. `variables` must be plain data (text, numbers, lists, mappings).

    Raise DataError when the template does not take this conversation, SpecError when it is broken, reaches for what
    it must not have, or asks for too much; both name the template's line.
    """
    template = _compiled(source, name)
    with _paid(variables, len(source), today) as spending:
        try:
            text = template.render(plain(variables))
            spending.show(len(text) - spending.largest)
        except Exception as error:  # whatever a template manages to raise
            raise _told(error, name) from None
    return text


@contextmanager
def _paid(variables: Mapping[str, Any], template: int, today: date) -> Iterator[Budget]:
    spending = Budget(_weight(variables), template, today)
    token = _spending.set(spending)
    try:
        yield spending
    finally:
        _spending.reset(token)


def plain(value: Any) -> Any:
    """Rebuild a value from exact JSON types: no object of ours ever meets a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value)


def _weight(value: Any) -> int:
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, Mapping):
        return sum(_weight(key) + _weight(item) for key, item in value.items())
    if isinstance(value, Sequence):
        return 1 + sum(map(_weight, value))
    return 8


def _told(error: Exception, name: str) -> LuthierError:
    where = f"{name}:{_line(error)}"
    if isinstance(error, Refused):
        return DataError(f"the template refuses this conversation: {error}", where=where)
    if isinstance(error, SecurityError):
        return SpecError(
            f"the template is stopped: {error}", where=where, remedy="use `template: plain`, or a template you trust"
        )
    if isinstance(error, (RecursionError, MemoryError, OverflowError)):
        return SpecError(f"the template is stopped: {type(error).__name__}", where=where)
    return DataError(f"the template cannot render this conversation: {error} ({type(error).__name__})", where=where)


def _line(error: Exception) -> int:
    """The template's line that an error rose from (Jinja rewrites its tracebacks)."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
