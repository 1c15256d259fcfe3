"""Text to token ids and back over the `tokenizers` library; equal to transformers' AutoTokenizer, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from luthier import store
from luthier.errors import DataError, ModelError
from luthier.text import marks

VOCABULARY = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
SETTINGS, NAMES, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
FILES = (VOCABULARY, SETTINGS, NAMES, GENERATION, CHAT_TEMPLATE)
# Tokens that end a turn or a text wherever they are special; `<|end|>` is phi's, but in harmony it parts channels.
KNOWN_ENDS = (
    "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<turn|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>",
    "<eos>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|eom_id|>",
)  # fmt: skip
KNOWN_PADS = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
ANCHORS = ("\x02", "\n", "|")  # text that is put before a piece so that it is not taken for the start of a text


class Tokenizer:
    """A model's tokenizer. `bos` is the token's text; `start` is what it puts before a text by itself (BOS or "")."""

    def __init__(self, backend: Backend, settings: dict[str, Any], files: dict[str, bytes]) -> None:
        self._backend, self._files = backend, files
        self.chat_template: str | None = settings.get("chat_template")
        self.bos: str = settings.get("bos_token") or ""
        self.unk: str = settings.get("unk_token") or ""
        added = sorted(backend.get_added_tokens_decoder().items())
        self._special = {token.content: number for number, token in added if token.special}
        self.specials: tuple[str, ...] = tuple(self._special)
        self.special_ids: frozenset[int] = frozenset(self._special.values())
        self._added = {token.content: number for number, token in added}
        self.ends: tuple[str, ...] = self._find_ends(settings)
        self.eos: str = settings.get("eos_token") or self.ends[0]
        self.stop_ids: frozenset[int] = frozenset(self._number(end) for end in self.ends)
        self.pad, self.pad_note = self._find_pad(settings)
        self.bos_id = self._number(self.bos) if self.bos else None
        self.eos_id, self.pad_id = self._number(self.eos), self._number(self.pad)
        self.vocab_size: int = max(backend.get_vocab_size(True), *(n + 1 for n in self._added.values()))
        opening = backend.encode("a").ids
        self.start: str = self.bos if self.bos and opening[:1] == [self.bos_id] else ""
        self._ahead: dict[str, list[int]] = {}
        self._prefixes = self._adds_prefix()

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read a model's or adapter's folder; raise ModelError when it has no readable `tokenizer.json`."""
        folder = Path(path)
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if VOCABULARY not in files:
            raise ModelError(
                f"has no {VOCABULARY}",
                where=str(folder),
                remedy="convert it once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            )
        settings = _settings(files, folder)
        try:
            backend = Backend.from_str(files[VOCABULARY].decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(
                f"is not a tokenizer that can be read ({error})", where=str(folder / VOCABULARY)
            ) from error
        backend.no_truncation()
        backend.no_padding()
        _add_named(backend, settings)
        return cls(backend, settings, files)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; control tokens spelt in it are control tokens, and none is added."""
        if (known := self._ahead.get(text)) is not None:
            return list(known)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_ahead(self, texts: Iterable[str]) -> None:
        """Encode many texts in one call, on all cores; until the next such call `encode` knows them already."""
        wanted = list(dict.fromkeys(texts))
        encoded = self._backend.encode_batch_fast(wanted, add_special_tokens=False) if wanted else []
        self._ahead = {text: encoding.ids for text, encoding in zip(wanted, encoded, strict=True)}

    def asked(self, text: str, *, after: str = "") -> Iterator[str]:
        """What `encode_marked` asks of `encode` first, stretch by stretch: texts worth encoding ahead."""
        for stretch, literal in marks.stretches(text):
            if not literal:
                yield self._lead(after) + stretch
            after = stretch

    def encode_with_offsets(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Token ids, each with the characters [begin, end) of the text that it covers."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a control token; raise DataError where the model's own vocabulary
        spells one in no other way."""
        for parts in ([text], *([text[:cut], text[cut:]] for cut in range(1, len(text)))):
            ids = [number for part in parts for number in self._continued(self._model_ids, part)]
            if not self._controls.intersection(ids):
                return ids
        raise DataError(f"holds {text!r}, which this tokenizer can only read as a control token", remedy="reword it")

    def encode_marked(self, text: str, *, after: str = "") -> list[int]:
        """Token ids of rendered text in which `marks` shield content; `after` is the text before it in the row."""
        ids: list[int] = []
        for stretch, literal in marks.stretches(text):
            ids += self.encode_plain(stretch) if literal else self._follow(stretch, after)
            after = stretch
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def decode_inner(self, ids: Sequence[int]) -> str:
        """Text of a run of tokens from the middle of a row: its first space is kept."""
        if not self._prefixes:
            return self.decode(ids, skip_special=False)
        head = self.encode("|")
        return self.decode([*head, *ids], skip_special=False).removeprefix(self.decode(head, skip_special=False))

    def token(self, number: int) -> str:
        """A token's entry in the vocabulary."""
        return str(self._backend.id_to_token(number))

    def shields(self, role: str) -> tuple[str, ...]:
        """The spellings that may not become tokens in a message of this role.

        Special tokens in every message. Where the model is not the author, also the other added tokens that the chat
        template writes (DeepSeek's role marks are such); an answer may hold them (`<think>`, `<tool_call>`).
        """
        return self.specials if role == "assistant" else self._template_controls

    @cached_property
    def hash(self) -> str:
        """Short content hash: everything that decides ids, ends and the chat template."""
        told = [self.bos, self.eos, self.pad, self.start, self.ends, self.chat_template, sorted(self._special)]
        return store.content_hash([self._files[VOCABULARY].decode("utf-8"), told])

    def save(self, folder: str | Path) -> None:
        """Copy the original files' bytes into a folder, so that it carries its own tokenizer."""
        for name, data in self._files.items():
            store.write_bytes(Path(folder) / name, data)

    @cached_property
    def _controls(self) -> frozenset[int]:
        return frozenset(self._number(text) for text in self._template_controls) - {self._backend.token_to_id(self.unk)}

    @cached_property
    def _template_controls(self) -> tuple[str, ...]:
        template = self.chat_template or ""
        return (
            *self.specials,
            *(
                text
                for text in self._added
                if text not in self._special and text.strip() and len(text) > 2 and text in template
            ),
        )

    def _number(self, text: str) -> int:
        number = self._backend.token_to_id(text)
        if number is None:
            raise ModelError(f"names {text!r} as a special token, which its vocabulary does not have", where=SETTINGS)
        return int(number)

    def _find_ends(self, settings: dict[str, Any]) -> tuple[str, ...]:
        told = [settings.get("eos_token"), *(self._backend.id_to_token(n) for n in settings["eos_ids"])]
        harmony = "<|return|>" in self._special
        known = [text for text in KNOWN_ENDS if text in self._special and not (harmony and text == "<|end|>")]
        ends = tuple(dict.fromkeys(text for text in (*told, *known) if text))
        if not ends:
            raise ModelError("has no token that ends a text", where=SETTINGS, remedy='name one: "eos_token"')
        return ends

    def _find_pad(self, settings: dict[str, Any]) -> tuple[str, str]:
        """A padding token that ends nothing where possible (it is masked anyway), and a sentence about the choice."""
        told = settings.get("pad_token") or ""
        ends = {self.eos, *(self._backend.id_to_token(number) for number in settings["eos_ids"])}
        if told and told not in ends:
            return told, ""
        spares = [text for text in self.specials if "reserved" in text or "unused" in text]
        named = [text for text in KNOWN_PADS if text in self._special]
        wishes = [*named, *spares, self.unk, *self.specials]
        choice = next((text for text in wishes if text and text not in ends and text != self.bos), self.eos)
        why = f"the tokenizer's padding token {told} ends answers" if told else "the tokenizer has no padding token"
        return choice, f"{why}; {choice} pads instead" if choice != told else f"{why}, and there is no other"

    def _adds_prefix(self) -> bool:
        head = self.encode(ANCHORS[0])
        return self.encode(ANCHORS[0] + "a") != head + self.encode("a")

    def _follow(self, text: str, after: str) -> list[int]:
        """Encode what stands after other text, without the space that some tokenizers put at the start of a text."""
        if not after:
            return self.encode(text)
        if self._prefixes and (special := self._ending(after)):
            return self.encode(special + text)[1:]
        return self._continued(self.encode, text)

    def _lead(self, after: str) -> str:
        """What `_follow` puts before a text first."""
        return (self._ending(after) or ANCHORS[0]) if after and self._prefixes else ""

    def _ending(self, text: str) -> str:
        """The added token that a text ends with, or nothing."""
        return next((token for token in self._added if text.endswith(token)), "")

    def _continued(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        for anchor in ANCHORS if self._prefixes else ():
            head, ids = encode(anchor), encode(anchor + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return encode(text)

    def _model_ids(self, text: str) -> list[int]:
        """Ids by the model alone: normaliser, pre-tokeniser, merges; no added token is looked for."""
        backend = self._backend
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, (0, len(text)))]
        return [token.id for word, _ in words for token in backend.model.tokenize(word)]


def _settings(files: dict[str, bytes], folder: Path) -> dict[str, Any]:
    """Join the settings of a tokenizer's files: plain names for named tokens, one chat template, ids that end."""
    told = {**_json(files, NAMES, folder), **_present(_json(files, SETTINGS, folder))}
    for key, value in told.items():
        if key.endswith("_token") and isinstance(value, dict):
            told[key] = value.get("content")
    template = told.get("chat_template")
    if isinstance(template, list):  # named templates: [{"name": "default", "template": "..."}]
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    if CHAT_TEMPLATE in files:
        template = files[CHAT_TEMPLATE].decode("utf-8")
    ends = _json(files, GENERATION, folder).get("eos_token_id")
    return {**told, "chat_template": template, "eos_ids": [ends] if isinstance(ends, int) else list(ends or [])}


def _json(files: dict[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except ValueError as error:
        raise ModelError(f"is not readable JSON ({error})", where=str(folder / name)) from error
    return value if isinstance(value, dict) else {}


def _present(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _add_named(backend: Backend, settings: dict[str, Any]) -> None:
    """Add tokens that only the settings name, as transformers does: first by number, then the named ones."""
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    numbered = settings.get("added_tokens_decoder") or {}
    for _, entry in sorted(numbered.items(), key=lambda item: int(item[0])):
        if entry.get("content") not in there:
            flags = {
                key: bool(entry[key])
                for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
                if key in entry
            }
            backend.add_tokens([AddedToken(entry["content"], **flags)])
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    extra = list(more.values()) if isinstance(more, dict) else list(more)
    named = [settings.get(f"{role}_token") for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    for text in [*named, *(entry.get("content") if isinstance(entry, dict) else entry for entry in extra)]:
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        if text and text not in known:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
