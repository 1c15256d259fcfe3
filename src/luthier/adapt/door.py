"""What the generic door to PEFT's shelf knows of each type: first values, learning rates, merging, refusals.

Every name of PEFT's enum stands in exactly one of the two tables; a test fails when a new PEFT brings another one.
Nothing here needs torch: a task that names a type is checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# Why a fresh adapter of some types is not the base itself.
ROUNDING = "tolerance"
NEVER_ZERO = "changes: its parts are shared by all layers and drawn at random, so the update is small but not zero"

CONTEXT = "trains tokens before the input, which PEFT adds in a forward pass that shared rows never take"


@dataclass(frozen=True)
class Entry:
    """A type that the door opens for."""

    learning_rate: float
    bracket: tuple[float, float]
    fresh: str = "exact"
    not_merged: str = ""
    targets: str = "all-linear"  # all-linear | norms | embeddings | factors: what is tuned where the task names none
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # where PEFT's do not fit
    divides: str = ""  # the option whose value must divide the layers' widths; the widest that does is taken
    own: str = ""  # the method of the same idea with a page of its own


OPEN: Mapping[str, Entry] = {
    "ADALORA": Entry(2e-3, (5e-4, 5e-3), own="adalora"),
    "ADAMSS": Entry(1e-3, (1e-4, 1e-2)),
    "BEFT": Entry(1e-3, (1e-4, 1e-2), not_merged="linear layers without a bias have no place for the learned one"),
    "BOFT": Entry(5e-4, (5e-5, 5e-3), own="boft"),
    "C3A": Entry(5e-2, (1e-3, 1.0), defaults={"init_weights": True}, divides="block_size", own="c3a"),
    "DEFT": Entry(1e-3, (5e-5, 5e-3), fresh=ROUNDING),
    "DELORA": Entry(1e-3, (1e-4, 1e-2), own="delora"),
    "FOURIERFT": Entry(3e-2, (1e-3, 3e-1), defaults={"init_weights": True}, own="fourierft"),
    "FROD": Entry(1e-3, (1e-4, 1e-2), fresh=ROUNDING, defaults={"progressbar": False}),
    "GLORA": Entry(1e-3, (5e-5, 5e-3)),
    "GRALORA": Entry(1e-3, (5e-5, 5e-3)),
    "HIRA": Entry(4.5e-3, (3e-4, 3e-2), own="hira"),
    "HRA": Entry(1e-3, (1e-4, 1e-2), fresh=ROUNDING, own="hra"),
    "IA3": Entry(5e-3, (1e-3, 1e-1), targets="factors", own="ia3"),
    "LN_TUNING": Entry(3e-3, (5e-4, 1e-2), targets="norms"),
    "LOHA": Entry(1e-3, (1e-4, 1e-2), own="loha"),
    "LOKR": Entry(3e-3, (3e-4, 3e-2), own="lokr"),
    "LORA": Entry(1e-3, (5e-5, 5e-3), own="lora"),
    "MISS": Entry(1e-3, (5e-5, 5e-3), own="miss"),
    "OFT": Entry(5e-4, (5e-5, 5e-3), own="oft"),
    "OSF": Entry(5e-5, (5e-6, 5e-4), fresh=ROUNDING),
    "PEANUT": Entry(1e-3, (5e-5, 5e-3)),
    "PSOFT": Entry(1e-3, (1e-4, 1e-2)),
    "RANDLORA": Entry(1e-3, (1e-4, 1e-2), defaults={"save_projection": False}, own="randlora"),
    "ROAD": Entry(1e-3, (1e-4, 1e-2), divides="group_size", own="road"),
    "SHIRA": Entry(1e-3, (1e-4, 1e-2), own="shira"),
    "SUPERTUNING": Entry(1e-3, (1e-4, 1e-2)),
    "TINYLORA": Entry(1e-2, (1e-3, 1e-1)),
    "TRAINABLE_TOKENS": Entry(1e-3, (1e-4, 1e-2), targets="embeddings"),
    "UNILORA": Entry(1e-2, (1e-3, 1e-1), fresh=NEVER_ZERO),
    "VBLORA": Entry(1e-2, (1e-3, 1e-1), fresh=NEVER_ZERO, divides="vector_length", own="vblora"),
    "VERA": Entry(5e-3, (1e-3, 5e-2), defaults={"save_projection": False}, own="vera"),
    "WAVEFT": Entry(3e-3, (1e-4, 3e-2), own="waveft"),
}

REFUSED: Mapping[str, str] = {
    "PROMPT_TUNING": f"{CONTEXT}: use the method `prompt`",
    "MULTITASK_PROMPT_TUNING": f"{CONTEXT}, and wants a task's number with every row: use the method `prompt`",
    "P_TUNING": f"{CONTEXT}: use the method `p_tuning`",
    "PREFIX_TUNING": f"{CONTEXT}: use the method `prefix`",
    "CPT": f"{CONTEXT}, and wants its rows labelled token by token: use the method `prompt`",
    "CARTRIDGE": f"{CONTEXT}, and is distilled from a long document that a task does not name: use `prefix`",
    "ADAPTION_PROMPT": "rewrites the attention of one model family, without shared rows: use `llama_adapter`",
    "LILY": "routes by the mean over all tokens of a batch, so that a row's answer would depend on its neighbours",
    "POLY": "wants a task's number with every forward pass, which a row of one task does not have",
    "PVERA": "draws noise at every training step, so that shared rows are not what separate rows are: use `vera`",
    "SHADOW": "sends a second network's state along with the hidden states, which shared rows do not carry",
    "XLORA": "mixes adapters that were trained before, by a second forward pass over them: train one of them",
}


def names() -> tuple[str, ...]:
    """All of PEFT's types, sorted."""
    return tuple(sorted({*OPEN, *REFUSED}))


# Parts of the names of parameters that begin at the base's own lengths, factors or rows: decay would pull the model
# away from its base, towards zero.
AT_HOME = (
    "boft_s.", "deft_", "delora_lambda", "frod_lambda_l", "ia3_l", "ln_tuning_layers", "lora_magnitude_vector",
    "osf_svd_params", "randlora_gamma", "road_alpha", "trainable_tokens", "vector_a", "vector_b", "vera_lambda_d",
    ".learning",
)  # fmt: skip


def undecayed(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """No weight decay for parameters that do not begin at zero or noise."""
    return {name: {"weight_decay": 0.0} for name in names if any(part in name for part in AT_HOME)}
