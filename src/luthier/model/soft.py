"""A soft prompt: k learned tokens before every row, as embeddings or as keys and values of every layer.

It is an attribute of the transformers model. Prefix trees take it as one more segment above all their roots, generation
as the beginning of the prefix that all rows share; both call the body, which knows nothing of it. A direct call of the
model passes through a forward of its own, which puts the prompt in front and returns what belongs to the real tokens.

Positions count the soft tokens: the first real token stands at position k, as in PEFT's prompt and prefix tuning.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from luthier.errors import ModelError

SOFT = "luthier_soft"  # attribute of a model that has a soft prompt
IGNORED = -100  # label of a token that nothing is asked of


@dataclass
class Soft:
    """`values()` gives, with autograd, embeddings (k, hidden) or (layers, 2, kv heads, k, head size) of each layer."""

    kind: Literal["embeddings", "key_values"]
    tokens: int
    values: Callable[[], torch.Tensor]
    enabled: bool = True

    def before(self, model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a body is given in place of `ids` (rows, tokens): k more at the front of each row.

        Keys and values come in by the attention; the first token k times over only holds their place.
        """
        if self.kind == "key_values":
            return {"input_ids": torch.cat([ids[:, :1].expand(-1, self.tokens), ids], 1)}
        return {"inputs_embeds": self.ahead_of(model.get_input_embeddings()(ids))}

    def ahead_of(self, embedded: torch.Tensor) -> torch.Tensor:
        """Put the prompt before embeddings: (rows, tokens, hidden) -> (rows, k + tokens, hidden)."""
        return torch.cat([self.values().to(embedded.dtype).expand(len(embedded), -1, -1), embedded], 1)

    def key_values(self, model: Any) -> torch.Tensor | None:
        """The keys and values (layers, 2, kv heads, k, head size), or None for embeddings."""
        return self.values().to(model.dtype) if self.kind == "key_values" else None


def soft_of(model: Any) -> Soft | None:
    """The soft prompt that is on a model and switched on, or None."""
    soft: Soft | None = getattr(model, SOFT, None)
    return soft if soft is not None and soft.enabled else None


def put_on(model: Any, soft: Soft) -> None:
    """Put a soft prompt on a model, for all of its calls."""
    if hasattr(model, SOFT):
        raise ModelError("this model has a soft prompt already", remedy="detach it first")
    setattr(model, SOFT, soft)
    model.forward = functools.partial(_forward, model, model.forward)


def take_off(model: Any) -> None:
    """Take the soft prompt off again; nothing of it is left."""
    usual = model.forward.args[1]
    del model.forward
    if model.forward != usual:  # it had a forward of its own before
        model.forward = usual
    delattr(model, SOFT)


def cache_name(model: Any) -> str:
    """What a model's forward calls the cache that it is given; transformers renamed it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _forward(model: Any, usual: Any, *args: Any, **named: Any) -> Any:
    """The model's forward with its soft prompt in front; arguments and result are those of the real tokens."""
    soft = soft_of(model)
    if soft is None:
        return usual(*args, **named)
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]
    given = dict(zip(parameters, args, strict=False)) | named
    given = {name: value for name, value in given.items() if value is not None}
    kept = cache_name(model)
    cache = given.pop("cache", given.pop("past_key_values", None))
    filled = _is_filled(cache)  # then the prompt is in it
    given |= _moved(soft, given, ahead=soft.kind == "embeddings" and not filled)
    if soft.kind == "embeddings" and not filled:
        return _embedded(model, usual, soft, given if cache is None else given | {kept: cache})
    return usual(**given, **{kept: cache if filled else _filled(model, soft, given, cache)})


def _moved(soft: Soft, given: dict[str, Any], *, ahead: bool) -> dict[str, torch.Tensor]:
    """The mask sees the soft tokens, positions count them; `ahead`: soft tokens are part of the call itself."""
    told, k = {}, soft.tokens
    if "attention_mask" in given:
        if not isinstance(given["attention_mask"], torch.Tensor) or given["attention_mask"].dim() != 2:
            raise ModelError("a soft prompt needs an attention mask of (rows, tokens)", remedy="leave the mask out")
        told["attention_mask"] = F.pad(given["attention_mask"], (k, 0), value=1)
    if "position_ids" in given:
        moved = given["position_ids"] + k
        first = torch.arange(k if ahead else 0, device=moved.device).expand(*moved.shape[:-1], -1)
        told["position_ids"] = torch.cat([first, moved], -1)
    return told


def _embedded(model: Any, usual: Any, soft: Soft, given: dict[str, Any]) -> Any:
    """Run embeddings behind the prompt's and cut the prompt off again."""
    ids, embedded = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if embedded is None:
        embedded = model.get_input_embeddings()(ids)
    if "labels" in given:  # the last soft token is not asked for the first real one: nor is anyone without a prompt
        given["labels"] = F.pad(given["labels"][:, 1:], (soft.tokens + 1, 0), value=IGNORED)
    if "shift_labels" in given:
        given["shift_labels"] = F.pad(given["shift_labels"], (soft.tokens, 0), value=IGNORED)
    if isinstance(given.get("logits_to_keep"), torch.Tensor):
        given["logits_to_keep"] = given["logits_to_keep"] + soft.tokens
    as_object = given.pop("return_dict", True)
    out = usual(inputs_embeds=soft.ahead_of(embedded), return_dict=True, **given)
    out.logits = out.logits[:, -embedded.shape[1] :]
    if out.get("hidden_states") is not None:
        out.hidden_states = tuple(states[:, soft.tokens :] for states in out.hidden_states)
    return out if as_object else out.to_tuple()


def _filled(model: Any, soft: Soft, given: dict[str, Any], cache: Any) -> Any:
    """A cache that begins with the prompt's keys and values for every row; an empty one that was given is filled."""
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if recomputes and model.training and torch.is_grad_enabled():
        raise ModelError(
            "recomputation of activations takes the prefix of keys and values out of a direct call",
            remedy="train through luthier.model.logprob, or turn checkpointing off",
        )
    rows = len(given["input_ids"] if "input_ids" in given else given["inputs_embeds"])
    cache = DynamicCache(config=model.config) if cache is None else cache
    key_values = soft.key_values(model)
    assert key_values is not None, "this is a prefix of keys and values"
    for layer, (key, value) in enumerate(key_values):
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    return cache


def _is_filled(cache: Any) -> bool:
    """Whether a cache holds the beginning of these rows already."""
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # layers that keep a state and no tokens
        return bool(cache.has_previous_state())
