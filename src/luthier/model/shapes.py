"""Well-known models as their sizes alone, to plan for a base that is not here. Counts of parameters are under test."""

from __future__ import annotations

from typing import Any

from luthier import registry
from luthier.errors import UsageError

LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8}
QWEN_3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
SMOLLM = {"vocab_size": 49_152, "tie_word_embeddings": True}
GEMMA_3 = {"vocab_size": 262_144, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512}

# name: (kind, hidden size, feed-forward, layers, heads, settings of its own)
SHAPES: dict[str, tuple[str, int, int, int, int, dict[str, Any]]] = {
    "llama-7b": ("llama", 4096, 11_008, 32, 32, {}),  # Touvron et al. 2302.13971, the bases of QLoRA's paper
    "llama-13b": ("llama", 5120, 13_824, 40, 40, {}),
    "llama-33b": ("llama", 6656, 17_920, 60, 52, {}),
    "llama-65b": ("llama", 8192, 22_016, 80, 64, {}),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, {**LLAMA_3, "head_dim": 64, "tie_word_embeddings": True}),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, {**LLAMA_3, "head_dim": 128, "tie_word_embeddings": True}),
    "llama-3.1-8b": ("llama", 4096, 14_336, 32, 32, LLAMA_3),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, {**QWEN_3, "tie_word_embeddings": True}),
    "qwen3-1.7b": ("qwen3", 2048, 6144, 28, 16, {**QWEN_3, "tie_word_embeddings": True}),
    "qwen3-4b": ("qwen3", 2560, 9728, 36, 32, {**QWEN_3, "tie_word_embeddings": True}),
    "qwen3-8b": ("qwen3", 4096, 12_288, 36, 32, QWEN_3),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, {**SMOLLM, "num_key_value_heads": 3}),
    "smollm2-360m": ("llama", 960, 2560, 32, 15, {**SMOLLM, "num_key_value_heads": 5}),
    "smollm2-1.7b": ("llama", 2048, 8192, 24, 32, SMOLLM),
    "gemma-3-270m": ("gemma3_text", 640, 2048, 18, 4, GEMMA_3),
    "gemma-3-1b": ("gemma3_text", 1152, 6912, 26, 4, GEMMA_3),
}


def config(name: str) -> Any:
    """The transformers configuration of a model by its name; UsageError for a name that is not in the list."""
    from transformers import AutoConfig

    if name not in SHAPES:
        raise UsageError(f"no shape is called '{name}'", where="--shape", remedy=registry.suggestion(name, SHAPES))
    kind, hidden, inner, layers, heads, own = SHAPES[name]
    return AutoConfig.for_model(
        kind, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        **{"max_position_embeddings": 4096, **own},
    )  # fmt: skip
