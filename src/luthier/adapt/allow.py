"""Which keys of a PEFT configuration may be set, and to what: the same rules for a task and for a stranger's folder.

A folder is untrusted: a key could name code or a file, an integer could ask for terabytes, a pattern could be a regular
expression that never ends. So each key of a type must hold its default, or be a field of the type's own class, not
stand in `CLOSED`, fit the class's annotation, and lie within `LIMITS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from luthier.adapt import door
from luthier.errors import CheckpointError, Fault
from luthier.registry import suggestion

FRAME = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}

DATA = "wants rows or statistics before training, which PEFT gathers in a way of its own"
BASE = "changes the base's own weights, which are shared and come back bit for bit"
CODE = "names code or files"
# Keys that must hold their default, by name or TYPE.name.
CLOSED: Mapping[str, str] = {
    "auto_mapping": CODE,
    "modules_to_save": "copies whole modules and trains them: use a method that trains weights",
    "bias": "trains the base's own biases: use `bitfit`",
    "trainable_token_indices": "trains rows of the embeddings beside the adapter: use a method of its own for them",
    "ensure_weight_tying": "matters only where whole modules are trained",
    "megatron_config": CODE,
    "megatron_core": CODE,
    "loftq_config": BASE,
    "eva_config": DATA,
    "corda_config": DATA,
    "lora_ga_config": DATA,
    "velora_config": "approximates gradients by averages over the batch, so that rows are not what they are alone",
    "monteclora_config": "draws noise in every forward pass, so that rows are not what they are alone",
    "kasa_config": BASE,
    "arrow_config": "routes between adapters that were trained before",
    "use_bdlora": "cuts the update into blocks for servers that split a layer over devices",
    "use_qalora": "is made for GPTQ bases",
    "alora_invocation_tokens": "switches the adapter on by a token, in a forward pass that shared rows never take",
    "layer_replication": "repeats layers of the base, which would then be another network",
    "runtime_config": "is no part of an adapter",
    "target_parameters": "adapts bare parameters, whose merging and detaching are not proven here",
    "runtime_offload_base_weight": "is no part of an adapter",
    "use_asa": "prunes by calls that only PEFT's own trainer makes",
    "UNILORA.save_indices": "stores positions that are drawn again from the seed",
    "VBLORA.save_only_topk_weights": "cannot be trained on",
    "ADALORA.rank_pattern": "leaves pruned ranks out of the file, which luthier keeps as zeros",
    "OSF.target_svd_config": "is what PEFT computes itself",
}
# First values that PEFT computes by changing the base, or from data.
FIRST_VALUES: Mapping[str, str] = {
    "pissa": f"{BASE}: the method `pissa` does it without",
    "olora": BASE,
    "loftq": BASE,
    "corda": BASE,
    "lora_ga": BASE,
    "eva": DATA,
}
INITIAL = ("init_lora_weights", "init_weights", "init_ia3_weights")
LARGEST_RANK = 1024
SEEDS = ("projection_prng_key", "random_seed", "random_loc_seed", "proj_seed", "projection_seed")
# Smallest and largest value of a number, by name or TYPE.name; others lie within WIDE.
WIDE = (-65_536, 65_536)
LIMITS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(SEEDS, (0, 2**63 - 1)),
    "r": (1, LARGEST_RANK), "OFT.r": (0, LARGEST_RANK), "TINYLORA.r": (1, 64), "OSF.effective_rank": (0, 65_536),
    "VERA.r": (1, 8192), "init_r": (1, LARGEST_RANK), "target_r": (1, LARGEST_RANK), "total_step": (1, 10**9),
    "tinit": (0, 10**9), "tfinal": (0, 10**9), "deltaT": (1, 10**9), "u": (1, 1024), "depth": (0, 16),
    "num_subspaces": (1, 1024), "subspace_rank": (1, LARGEST_RANK), "boft_block_size": (0, 4096),
    "boft_block_num": (0, 4096), "oft_block_size": (0, 4096), "boft_n_butterfly_factor": (1, 12),
    "num_cayley_neumann_terms": (1, 64), "num_vectors": (1, 8192), "vector_length": (1, 65_536), "topk": (1, 64),
    "theta_d_length": (1, 2**22), "n_frequency": (1, 2**22), "gralora_k": (1, 256), "hybrid_r": (0, LARGEST_RANK),
    "stride_A": (1, 1024), "num_B": (1, 256), "psoft_svd_lowrank_niter": (0, 100), "mini_r": (1, LARGEST_RANK),
    "group_size": (2, 65_536), "block_size": (1, 65_536), "token_indices": (0, 2**31), "decompose_factor": (-1, 65_536),
}  # fmt: skip
PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
WORD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
MODULE = re.compile(r"[\w.|()\\^$*+?\[\]-]{1,400}")
ENTRIES = 10_000  # of a list or a table


def config_class(kind: str) -> type[PeftConfig]:
    """The configuration class of a type that stands in PEFT's tables."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]


@functools.cache
def fields(kind: str) -> Mapping[str, Any]:
    """The annotation of every key that the type's own class declares, but for those that luthier fills in."""
    cls = config_class(kind)
    hints = typing.get_type_hints(cls)
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init and f.name not in FRAME}


@functools.cache
def defaults(kind: str) -> Mapping[str, Any]:
    """The value of every key in a configuration of which nothing was set."""
    cls = config_class(kind)
    return {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(cls)
        if f.init
    }


def faults(kind: str, given: Mapping[str, Any]) -> list[Fault]:
    """All that is wrong with the keys and values of a configuration; an empty list means that PEFT may see it."""
    known = fields(kind)
    found: list[Fault] = []
    for key, value in given.items():
        if key not in known:
            if value not in (None, False, [], {}):
                found.append(Fault(key, f"is no option of PEFT's {kind}", suggestion(key, settable(kind))))
        elif not _is_default(kind, key, value):
            found += [Fault(key, told) for told in _value_faults(kind, key, value)]
    return found


def settable(kind: str) -> list[str]:
    """The keys of a type that need not hold their default."""
    return [key for key in fields(kind) if f"{kind}.{key}" not in CLOSED and key not in CLOSED]


def _is_default(kind: str, key: str, value: Any) -> bool:
    default = defaults(kind)[key]
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        default = dataclasses.asdict(default)
    return value is None or (type(value) is type(default) and value == default) or (value == {} and not default)


def _value_faults(kind: str, key: str, value: Any) -> Iterator[str]:
    reason = CLOSED.get(f"{kind}.{key}", CLOSED.get(key))
    if reason is not None:
        yield f"is set to {_short(value)}, which luthier does not load: it {reason}"
        return
    if key in INITIAL and isinstance(value, str):
        for first, why in FIRST_VALUES.items():
            if value.lower().startswith(first):
                yield f"is set to {_short(value)}, which luthier does not load: it {why}"
                return
    try:
        _checker(kind, key).validate_python(value, strict=True)
    except ValidationError as error:
        told = dict.fromkeys(f"{item['msg']} (got {_short(item['input'])})" for item in error.errors())
        yield "; ".join(list(told)[:3])
        return
    low, high = LIMITS.get(f"{kind}.{key}", LIMITS.get(key, WIDE))
    yield from dict.fromkeys(_bounded(value, low, high, key in PATTERNS))


@functools.cache
def _checker(kind: str, key: str) -> TypeAdapter[Any]:
    annotation = fields(kind)[key]
    # PEFT writes `int` where numbers with a fraction work as well: scales.
    loose = annotation is int and any(word in key for word in ("alpha", "lambda", "scal"))
    return TypeAdapter(float if loose else annotation, config=ConfigDict(arbitrary_types_allowed=True))


def _bounded(value: Any, low: float, high: float, pattern: bool) -> Iterator[str]:
    """What is wrong with the numbers and texts in a value, however deep they lie."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        if not math.isfinite(value) or not low <= value <= high:
            yield f"is {value}, it must lie between {low:g} and {high:g}"
    elif isinstance(value, str):
        if not (_is_tame(value) if pattern else WORD.fullmatch(value)):
            yield f"{_short(value)} is not a plain name"
    elif isinstance(value, Mapping):
        if len(value) > ENTRIES:
            yield f"has more than {ENTRIES} entries"
        for key, inner in list(value.items())[:ENTRIES]:
            yield from () if _is_tame(str(key)) else (f"{_short(key)} is not a plain name",)
            yield from _bounded(inner, low, high, pattern)
    elif isinstance(value, list | tuple | set):
        if len(value) > ENTRIES:
            yield f"has more than {ENTRIES} entries"
        for inner in list(value)[:ENTRIES]:
            yield from _bounded(inner, low, high, pattern)


def _is_tame(pattern: str) -> bool:
    """Whether PEFT may use a text as a regular expression over module names: no nested or many repetitions."""
    if not MODULE.fullmatch(pattern) or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+]", pattern)) > 3:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def clean(written: Mapping[str, Any], where: str) -> PeftConfig:
    """Rebuild a configuration from an untrusted `adapter_config.json`; CheckpointError lists what is refused."""
    kind = str(written.get("peft_type"))
    if kind in door.REFUSED or kind not in door.OPEN:
        why = f"of type {kind}: {door.REFUSED[kind]}" if kind in door.REFUSED else f"of an unknown type '{kind}'"
        raise CheckpointError(f"an adapter {why}", where=where)
    given = {key: value for key, value in written.items() if key not in FRAME and not _is_drawn(kind, key, value)}
    found = faults(kind, given)
    if found:
        raise CheckpointError("the adapter's configuration is refused", where=where, faults=found)
    try:
        known = {key: value for key, value in given.items() if key in fields(kind) and value is not None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return config_class(kind)(task_type="CAUSAL_LM", base_model_name_or_path=_text(written), **known)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the adapter's configuration is refused: {error}", where=where) from error


def _is_drawn(kind: str, key: str, value: Any) -> bool:
    """Whether a key only says how first values were drawn, which no longer matters once they are read from the file."""
    if key not in INITIAL or kind == "MISS":  # MiSS' `init_weights` picks a forward pass
        return False
    reason = FIRST_VALUES.get(value.lower().partition("_niter")[0], "") if isinstance(value, str) else ""
    return value is None or (isinstance(value, str) and not reason.startswith(BASE))


def _text(written: Mapping[str, Any]) -> str | None:
    name = written.get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 80 else told[:77] + "..."
