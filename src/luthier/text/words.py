"""Words of any script: what overlap metrics and repetition guards count. No torch, no tokenizer."""

from __future__ import annotations

import unicodedata

# Scripts written without spaces: every character is a word of its own (with its combining marks).
_UNSPACED = (
    (0x0E00, 0x0EFF, "thai"),  # Thai, Lao
    (0x1000, 0x109F, "myanmar"),
    (0x1780, 0x17FF, "khmer"),
    (0x2E80, 0x2FFF, "han"),
    (0x3040, 0x30FF, "kana"),
    (0x31F0, 0x31FF, "kana"),
    (0x3400, 0x4DBF, "han"),
    (0x4E00, 0x9FFF, "han"),
    (0xF900, 0xFAFF, "han"),
    (0x20000, 0x3FFFF, "han"),
)


def unspaced(character: str) -> str:
    """Name the space-free script of a character (`han`, `kana`, `thai` ...); empty for all others."""
    code = ord(character)
    if code < 0x0E00:
        return ""
    return next((name for low, high, name in _UNSPACED if low <= code <= high), "")


def words(text: str) -> list[str]:
    """Split into comparable words: NFKC, case-folded, punctuation left out; symbols and emoji each count as one.

    A text of nothing but punctuation is split into its characters, so that it still equals itself.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    found: list[str] = []
    joins = False  # the next letter continues the last word
    for character in text:
        kind = unicodedata.category(character)
        if kind[0] == "M" and found and (joins or unspaced(character)):
            found[-1] += character
        elif kind[0] in "LNM" and unspaced(character):
            found.append(character)
            joins = False
        elif kind[0] in "LNM":
            found[len(found) - joins :] = [(found[-1] if joins else "") + character]
            joins = True
        elif kind[0] == "S":
            found.append(character)
            joins = False
        else:
            joins = False
    return found or [character for character in text if not character.isspace()]


def script(text: str) -> str:
    """Name the space-free script that the text is written in, else `spaced`.

    A third of the words make a script; a tenth is enough for kana, since Japanese is half Han.
    """
    found = [unspaced(word[0]) for word in words(text)]
    for name in ("kana", *sorted(set(found) - {"", "kana"})):
        if found.count(name) >= max(1.0, len(found) * (0.1 if name == "kana" else 1 / 3)):
            return name
    return "spaced"
