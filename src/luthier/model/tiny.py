"""A tiny random model folder, made in this process: the shipped fake that tests and dry runs stand on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import registry
from luthier.errors import UnknownName

if TYPE_CHECKING:
    import torch

VOCABULARY = 600
CONTEXT = 1024
SLIDING_WINDOW = 16
INIT_RANGE = 0.15  # wide enough that some tokens are much likelier than others
END, START, NOTHING = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
SYSTEM = "You are a helpful AI assistant named Tiny, made of random numbers"

# The same hidden default as SmolLM2's template: a conversation without a system turn silently gets one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = """
A luthier makes and mends instruments with strings. She looks at the wood first, then she listens to it.
The question is not whether the tool is sharp, but whether the cut is right. Answer with one word: yes or no.
Please read the message and write the answer as JSON with the fields name, date, time, place, price and note.
{"name": "Anna", "date": "2024-05-17", "time": "09:30", "place": "Bern", "price": 120, "note": null}
{"name": "Ben", "date": "2024-06-02", "time": "14:15", "place": "Lyon", "price": 85.5, "note": "call first"}
### Question: What is the capital of France?
### Answer: The capital of France is Paris.
You are a helpful assistant. The user asks, the assistant answers, and the system says how.
Hello, I would like to move my appointment from Monday morning to Thursday afternoon, if that is possible.
My order has not arrived yet and the tracking page says that it was delivered on Friday. Where is it?
The washing machine is broken: it does not drain, and there is water on the floor. Can someone come today?
def add(left: int, right: int) -> int:
    return left + right
One two three four five six seven eight nine ten. 0 1 2 3 4 5 6 7 8 9 10 11 12 20 50 100 200 500 1000.
制琴师制作并修理弦乐器。她先看木头，然后再听它的声音。
请阅读下面的消息，并用一个词回答：是或者不是。
问题：法国的首都是哪里？回答：法国的首都是巴黎。
你好，我想把星期一上午的预约改到星期四下午，可以吗？
我的订单还没有到，请问现在在哪里？洗衣机坏了，今天可以来修理吗？
Où est la clé ? Elle coûte 12 € à Zürich. ¿Dónde está mañana? Straße, naïve, café.
"""


def write(folder: Path, architecture: str = "llama", *, seed: int = 0, layers: int = 2, hidden: int = 64) -> Path:
    """Write a tiny random model that transformers loads offline, and return its folder.

    The bytes depend on the arguments only. `hidden` is the width of the residual stream, a multiple of 8. Raise
    UnknownName for an architecture that is not one of `ARCHITECTURES`.
    """
    if architecture not in ARCHITECTURES:
        raise UnknownName(
            f"no tiny model is called '{architecture}'", remedy=registry.suggestion(architecture, list(ARCHITECTURES))
        )
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder)
    shared = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": INIT_RANGE,
        "vocab_size": VOCABULARY,
        "bos_token_id": ids[START],
        "eos_token_id": ids[END],
        "pad_token_id": ids[NOTHING],
    }
    with torch.random.fork_rng(devices=[]):  # the library draws weights of its own first
        model = ARCHITECTURES[architecture](shared)
    _fill(model, seed)
    model.save_pretrained(folder)
    return folder


def _llama(shared: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**shared, num_key_value_heads=2, tie_word_embeddings=True))


def _qwen3(shared: Mapping[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    head = shared["hidden_size"] // shared["num_attention_heads"]
    return Qwen3ForCausalLM(Qwen3Config(**shared, num_key_value_heads=2, head_dim=head, tie_word_embeddings=True))


def _gemma3(shared: Mapping[str, Any]) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    head = shared["hidden_size"] // shared["num_attention_heads"]
    last = shared["num_hidden_layers"] - 1
    kinds = ["full_attention" if index == last else "sliding_attention" for index in range(last + 1)]
    config = Gemma3TextConfig(
        **shared,
        num_key_value_heads=2,
        head_dim=head,
        query_pre_attn_scalar=head,
        sliding_window=SLIDING_WINDOW,
        layer_types=kinds,
    )
    return Gemma3ForCausalLM(config)


def _gpt_neox(shared: Mapping[str, Any]) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**shared, tie_word_embeddings=False))


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gpt_neox": _gpt_neox,
}


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew from one generator, so that the bytes do not hang on the library's own order.

    Vectors are norm scales and biases: small noise about the value the library chose, so that none is a no-op.
    """
    import torch

    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=source)
            if parameter.dim() > 1:
                parameter.copy_(INIT_RANGE * noise)
            else:
                parameter.copy_(torch.round(parameter) + 0.05 * noise)


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """Train a byte-level BPE on `TEXT`, write its files and return the ids of the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[NOTHING, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in (NOTHING, START, END)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": NOTHING,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return ids
