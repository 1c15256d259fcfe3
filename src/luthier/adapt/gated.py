"""LLaMA-Adapter's gated prompts in the attention of the upper layers, through PEFT's AdaptionPrompt, in PEFT's layout.

PEFT wraps the attention modules instead of swapping linear layers, so it cannot `unload`; and it takes the shapes of
some families for granted. Refused is what it would compute wrongly:

- a head size of its own: PEFT finds the number of key heads from the widths of two matrices;
- a bias on the attention's output matrix: PEFT adds it a second time, and a fresh adapter would change the base.

In GPT-2 PEFT adds the prompts' values without the attention's output matrix; so does this, being PEFT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NoReturn

from peft import AdaptionPromptConfig, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier import registry, store
from luthier.adapt import folder as files
from luthier.adapt import wrapped
from luthier.adapt.blocks import blocks
from luthier.errors import CheckpointError, Fault, SpecError

KIND = "ADAPTION_PROMPT"
FAMILIES = ("llama", "mistral", "gpt2")  # what PEFT knows; SmolLM2 and many more call themselves llama
IGNORED = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}


class GatedAdapted(wrapped.PeftAdapted):
    """A base whose upper attentions are wrapped by PEFT's AdaptedAttention."""

    def settings(self) -> dict[str, Any]:
        """PEFT's configuration as it is written; the target is an attention's name, no pattern."""
        return {**self.wrapped.peft_config["default"].to_dict(), "inference_mode": True}

    def merge(self) -> NoReturn:
        """Refuse: what a prompt adds depends on each token's query."""
        raise SpecError(
            "LLaMA-Adapter's prompts cannot be merged: what they add depends on each token's query",
            remedy="serve the adapter beside its base, or train lora where a merged model is needed",
        )

    def detach(self) -> Any:
        """Put the base's own attention modules back and return the plain base, unchanged."""
        self.wrapped.base_model.disable_adapter_layers()  # type: ignore[operator]
        return self.model


class _Written(BaseModel):
    """A folder's configuration as far as it may steer; the word of a stranger."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    target_modules: Literal["self_attn", "attn"] | None = None  # PEFT finds it anew by the family
    adapter_len: int = Field(ge=1, le=4096)
    adapter_layers: int = Field(ge=1, le=4096)


def attach(model: Any, *, length: int, layers: int | None, seed: int) -> GatedAdapted:
    """Put fresh prompts of `length` tokens into the top `layers` layers; None: all but the lowest two.

    The gates start at zero, so nothing changes; prompts are drawn from `seed` alone. SpecError where PEFT's
    implementation does not know the model, or would compute something else.
    """
    require_known(model)
    count = len(blocks(model))
    if layers is not None and layers > count:
        raise SpecError(f"the model has {count} layers, not {layers}", where="method.layers")
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=length, adapter_layers=layers or max(1, count - 2))
    return GatedAdapted(wrapped.attach(model, config, seed=seed).wrapped)


def load(model: Any, folder: Path) -> GatedAdapted:
    """Put saved prompts on a model; CheckpointError, and the base as it was, unless every tensor fits."""
    written = read_config(folder)
    tensors = files.read_tensors(folder / files.WEIGHTS)
    adapted = attach(model, length=written.adapter_len, layers=written.adapter_layers, seed=0)
    try:
        files.require_fit(folder, tensors, {name: tuple(t.shape) for name, t in adapted.tensors().items()})
    except CheckpointError:
        adapted.detach()
        raise
    set_peft_model_state_dict(adapted.wrapped, tensors)
    return adapted


def read_config(folder: Path) -> _Written:
    """Read an untrusted configuration; CheckpointError with every setting that is unknown or out of range."""
    place = str(folder / files.CONFIG)
    written = dict(store.read_json(folder / files.CONFIG))
    if written.get("peft_type") != KIND:
        raise CheckpointError(f"is an adapter of type {written.get('peft_type')!r}, not {KIND}", where=place)
    kept = {key: value for key, value in written.items() if key not in IGNORED and value is not None}
    try:
        return _Written(**kept)
    except ValidationError as error:
        faults = registry.faults_of(error, "", _Written.model_fields)
        raise CheckpointError("the adapter's configuration is refused", where=place, faults=faults) from error


def require_known(model: Any) -> None:
    """Raise SpecError, with all reasons, unless PEFT's gated prompts are right for this model."""
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise SpecError(
            f"LLaMA-Adapter is written for the attention of {known} models; this one is {config.model_type}",
            where="method.name",
            remedy="use prefix or bottleneck, which ask less of the attention",
        )
    attention = blocks(model)[0].attention[1]
    heads, size = config.num_attention_heads, getattr(attention, "head_dim", 0)
    faults = []
    if heads * size != config.hidden_size:
        faults.append(Fault("attention", f"{heads} heads of {size} are not the model's width {config.hidden_size}"))
    if getattr(getattr(attention, "o_proj", None), "bias", None) is not None:
        faults.append(Fault("attention", "its output matrix has a bias, which PEFT would add twice"))
    if faults:
        raise SpecError(
            "PEFT's LLaMA-Adapter is wrong for this model", where="method.name", faults=faults, remedy="use prefix"
        )
