"""One offline page from a report: no script, no request, every text from data escaped and its controls shown."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from luthier import store
from luthier.evaluate import plots, wording

TEMPLATE = "page.html.jinja"
LONGEST = 4000  # characters of one text on the page
_HARMLESS = "\n\t\u200c\u200d"  # joiners belong to emoji and to Indic and Persian spelling


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as one self-contained HTML file, atomically."""
    store.write_text(path, render(report))


def render(report: Mapping[str, Any]) -> str:
    """The page's HTML."""
    training = report["training"]
    pictures = {"flow": plots.flow(report["transitions"]), "curve": plots.curve(training) if training else {}}
    return template_environment().get_template(TEMPLATE).render(report=report, pictures=pictures)


def visible(text: str) -> str:
    """Show characters that would act rather than print: controls, escapes, direction marks, hidden and half ones."""
    if text.isprintable():
        return text
    return "".join(_shown(character) if _acts(character) else character for character in text)


def _acts(character: str) -> bool:
    if character in _HARMLESS:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return f"\u27e6U+{code:04X}\u27e7"


def _final(value: Any) -> Any:
    """What every expression of the template passes through, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _told(value: Any) -> str:
    """A JSON value for reading: texts as they are, fractions to six digits, all else as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short(text: str, length: int = LONGEST) -> str:
    text = text.strip()
    return text if len(text) <= length else f"{text[:length]} \u2026 ({len(text) - length:,} more characters)"


def _unbroken(text: str) -> str:
    """Keep numbers and their units on one line."""
    return text.replace(" %", "\u00a0%").replace(" = ", "\u00a0=\u00a0").replace(" points", "\u00a0points")


def _size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


@cache
def template_environment() -> ImmutableSandboxedEnvironment:
    """The sandbox that pages are rendered in: everything escaped, nothing undefined."""
    environment = ImmutableSandboxedEnvironment(
        loader=PackageLoader("luthier", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_final,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"percent": wording.percent, "points": wording.points, "chance": wording.chance, "told": _told}
    environment.filters |= {
        **filters,
        "short": _short,
        "unbroken": _unbroken,
        "bytes": _size,
        "duration": _duration,
        "rounded": wording.rounded,
    }
    return environment
