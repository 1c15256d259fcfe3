"""Small random networks of every kind that prefix trees must be exact for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 200
KINDS = ("llama", "qwen3", "gemma3", "gpt_neox")
WINDOW = 16  # shorter than the tests' rows, so that sliding windows matter


@functools.cache
def _pristine(kind: str) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.15,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=16))
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(
            **shape, num_key_value_heads=1, head_dim=16, sliding_window=WINDOW, layer_types=layers
        )
        return Gemma3ForCausalLM(config)
    if kind == "mistral":  # beside KINDS: for methods that know few families
        return MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=2, head_dim=16, sliding_window=WINDOW))
    if kind == "gpt2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**shape, **quiet))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))


def network(kind: str) -> Any:
    """A fresh copy of a network, in evaluation mode, frozen."""
    import copy

    return copy.deepcopy(_pristine(kind)).eval().requires_grad_(False)
