"""Soft prompts: learned tokens before every row, through PEFT's own encoders, in PEFT's folder layout.

Only the encoder's output is kept, under PEFT's name `prompt_embeddings`: (k, hidden) embeddings, or (k, layers * 2 * kv
heads * head size) keys and values. A folder that was loaded has no encoder any more: its output is what learns on.
How the prompt reaches the model is the affair of `luthier.model.soft`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from torch import nn
from transformers import DynamicCache

from luthier import contracts, store
from luthier.adapt import folder as files
from luthier.adapt.folder import CONFIG, WEIGHTS
from luthier.errors import CheckpointError, Fault, SpecError
from luthier.model.attention import shares_prefixes
from luthier.model.soft import Soft, cache_name, put_on, soft_of, take_off
from luthier.text.tokenizer import VOCABULARY, Tokenizer

TENSOR = "prompt_embeddings"
COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"  # PEFT's names of a task's two thin matrices
COMMON_TOKENS = 5_000  # first values are drawn from the vocabulary's first tokens, its most frequent ones (2104.08691)
LARGEST = 4_096  # tokens of a prompt that a folder may ask for
PREFIX = "PREFIX_TUNING"
MUST_FIT = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


class Table(nn.Module):
    """A prompt whose every number learns by itself."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        """The prompt (k, width)."""
        return self.prompt_embeddings


class Encoded(nn.Module):
    """A prompt that one of PEFT's encoders makes; `start` (k, width) is added to what it makes, and does not learn."""

    start: torch.Tensor | None

    def __init__(self, encoder: nn.Module, tokens: int, start: torch.Tensor | None = None, **more: Any) -> None:
        """`more` goes to the encoder with every call."""
        super().__init__()
        self.encoder, self.tokens, self.more = encoder, tokens, more
        self.register_buffer("start", start)

    def forward(self) -> torch.Tensor:
        """The prompt (k, width)."""
        device = next(self.encoder.parameters()).device
        made: torch.Tensor = self.encoder(torch.arange(self.tokens, device=device)[None], **self.more)[0]
        return made if self.start is None else self.start + made


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a prompt needs to know of its base."""

    tokens: int
    layers: int
    heads: int  # of keys and values for a prefix, of queries else, as PEFT counts them
    size: int  # of a head
    hidden: int
    width: int  # of the kept tensor (tokens, width)
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any, kind: str, tokens: int) -> Shape:
        """Read the sizes that PEFT would give a prompt of this peft_type."""
        config, weight = model.config.get_text_config(), model.get_input_embeddings().weight
        heads, hidden = config.num_attention_heads, weight.shape[1]
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        if kind != PREFIX:
            return cls(tokens, config.num_hidden_layers, heads, size, hidden, hidden, weight.dtype)
        heads = getattr(config, "num_key_value_heads", None) or heads
        layers = config.num_hidden_layers
        return cls(tokens, layers, heads, size, hidden, layers * 2 * heads * size, model.dtype)

    def split(self, flat: torch.Tensor) -> torch.Tensor:
        """(tokens, width) as PEFT lays it out -> (layers, 2, heads, tokens, size)."""
        return flat.view(self.tokens, self.layers, 2, self.heads, self.size).permute(1, 2, 3, 0, 4)

    def flatten(self, key_values: torch.Tensor) -> torch.Tensor:
        """The way back of `split`."""
        return key_values.permute(3, 0, 1, 2, 4).reshape(self.tokens, self.width)


class PromptAdapted(contracts.Adapted):
    """A base with a soft prompt before its input."""

    def __init__(self, model: Any, config: PeftConfig, shape: Shape, encoder: nn.Module) -> None:
        self.model, self.config, self.shape = model, config, shape
        self.encoder = encoder.to(model.device)
        prefix = config.peft_type == PREFIX
        values = (lambda: shape.split(self._prompt())) if prefix else self._prompt
        put_on(model, Soft("key_values" if prefix else "embeddings", shape.tokens, values))
        model.requires_grad_(False)

    def _prompt(self) -> torch.Tensor:
        """The prompt (k, width) in the precision that the base sees."""
        prompt: torch.Tensor = self.encoder()
        return prompt.to(self.shape.dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The prompt, or the encoder that makes it."""
        return dict(self.encoder.named_parameters())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the bare base."""
        soft = soft_of(self.model)
        if soft is None:
            yield
            return
        soft.enabled = False
        try:
            yield
        finally:
            soft.enabled = True

    def saved_bytes(self) -> int:
        """The prompt's own size: an encoder is not kept."""
        return 4 * self.shape.tokens * self.shape.width

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write PEFT's two files: the prompt in float32 and what it was made for."""
        files.write(folder, self.config.to_dict() | {"inference_mode": True}, {TENSOR: self._prompt().float()})

    def merge(self) -> NoReturn:
        """Refuse: a prompt is input, and no matrix holds it."""
        raise SpecError(
            "a soft prompt cannot be merged: it is input, not weights",
            remedy="serve the adapter beside its base, or train lora where a merged model is needed",
        )

    def detach(self) -> Any:
        """Take the prompt off and return the plain base, unchanged."""
        take_off(self.model)
        return self.model


def attach(
    model: Any, kind: str, tokens: int, make: Callable[[PeftConfig, Shape], nn.Module], *, seed: int, **settings: Any
) -> PromptAdapted:
    """Put a fresh prompt of peft_type `kind` on a model; `make` builds its encoder with all randomness from `seed`.

    `settings` go into PEFT's configuration. SpecError where the base cannot take such a prompt.
    """
    _require_able(model, kind)
    shape = Shape.of(model, kind, tokens)
    config = _config(model, kind, shape, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = make(config, shape)
    return PromptAdapted(model, config, shape, encoder)


def _config(model: Any, kind: str, shape: Shape, **settings: Any) -> PeftConfig:
    """PEFT's configuration; `auto_mapping`, which PEFT reads for custom tasks only, names the base's class."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](  # type: ignore[index, call-arg]
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path or None,
        auto_mapping={"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        num_virtual_tokens=shape.tokens,
        token_dim=shape.heads * shape.size if kind == PREFIX else shape.hidden,
        num_transformer_submodules=1,
        num_attention_heads=shape.heads,
        num_layers=shape.layers,
        **settings,
    )


def _require_able(model: Any, kind: str) -> None:
    """Raise SpecError unless this base reads embeddings, or keys and values, as such a prompt hands them over."""
    reason = shares_prefixes(model) if kind == PREFIX else ""
    if reason:
        raise SpecError(f"no keys and values can be put before its rows: {reason}", remedy="use method: prompt")
    if model.device.type == "meta":
        return
    if kind == PREFIX:
        found, shape = _key_values(model, torch.zeros(1, dtype=torch.long)), Shape.of(model, kind, 1)
        wrong = sorted({tuple(pair.shape) for pair in found} - {(2, shape.heads, 1, shape.size)})
        if wrong or len(found) != shape.layers:
            raise SpecError(f"its layers keep keys and values of different shapes {wrong}", remedy="use method: prompt")
        return
    if model.training:  # its dropout would differ between the two
        return
    ids = torch.arange(2, device=model.device)[None]
    with torch.no_grad():
        body = model.get_decoder()
        told = body(input_ids=ids, use_cache=False).last_hidden_state
        given = body(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).last_hidden_state
    if not torch.allclose(told, given, rtol=1e-3, atol=1e-3):
        raise SpecError(
            "this base makes more of its input than embeddings of it", remedy="use a method without prompts"
        )


def load(model: Any, folder: Path, kind: str) -> PromptAdapted:
    """Put a saved prompt of peft_type `kind` on a model; CheckpointError unless it was made for it and fits."""
    _require_able(model, kind)
    tokens = _read_tokens(model, folder, kind)
    shape = Shape.of(model, kind, tokens)
    tensors = files.read_tensors(folder / WEIGHTS)
    files.require_fit(folder, tensors, {TENSOR: (tokens, shape.width)})
    if not tensors[TENSOR].is_floating_point():
        raise CheckpointError(f"{TENSOR} holds whole numbers", where=str(folder / WEIGHTS))
    return PromptAdapted(model, _config(model, kind, shape), shape, Table(tensors[TENSOR].to(shape.dtype)))


def _read_tokens(model: Any, folder: Path, kind: str) -> int:
    """Check an untrusted configuration against the base and return the prompt's length.

    Nothing else is taken from it: keys that name files, tokenizers or modules (`tokenizer_name_or_path`,
    `prompt_tuning_init_state_dict_path`, `auto_mapping`'s `parent_library`) belong to PEFT's first values and class
    look-up, and are never followed.
    """
    where, written = str(folder / CONFIG), store.read_json(folder / CONFIG)
    if not isinstance(written, dict):
        raise CheckpointError("is not a JSON object", where=where)
    if written.get("peft_type") != kind:
        raise CheckpointError(f"is an adapter of type {written.get('peft_type')!r}, not {kind}", where=where)
    tokens = written.get("num_virtual_tokens")
    if type(tokens) is not int or not 0 < tokens <= LARGEST:
        raise CheckpointError(f"num_virtual_tokens is {tokens!r}, it must lie between 1 and {LARGEST}", where=where)
    told, config = written | _flat_mapping(written), _config(model, kind, Shape.of(model, kind, tokens)).to_dict()
    known = config.keys() | {"base_model_class"}
    faults = [Fault(key, "is not a setting of this adapter") for key in sorted(told.keys() - known) if told[key]]
    expected: dict[str, Any] = {key: config[key] for key in MUST_FIT} | {"modules_to_save": None}
    expected["base_model_class"] = type(model).__name__
    faults += [
        Fault(key, f"is {told[key]!r}, this base needs {value!r}")
        for key, value in expected.items()
        if told.get(key) is not None and told[key] != value
    ]
    if faults:
        raise CheckpointError("the adapter's configuration is refused", where=where, faults=faults)
    return tokens


def _flat_mapping(written: dict[str, Any]) -> dict[str, Any]:
    mapping = written.get("auto_mapping")
    return {"base_model_class": mapping.get("base_model_class")} if isinstance(mapping, dict) else {}


def draw_ids(model: Any, tokens: int) -> torch.Tensor:
    """Draw ids (tokens,) of frequent tokens, from torch's generator as it stands."""
    return torch.randint(0, min(COMMON_TOKENS, model.get_input_embeddings().weight.shape[0]), (tokens,))


def text_ids(model: Any, tokens: int, text: str) -> torch.Tensor:
    """Ids (tokens,) of a text by the base's own tokenizer, repeated to fill the prompt; SpecError if it is longer."""
    folder = Path(model.config.name_or_path or "")
    if not (folder / VOCABULARY).is_file():
        raise SpecError(
            "starting from a text needs the base's tokenizer, and this model was not loaded from a folder with one",
            where="method.init", remedy="use init: vocabulary",
        )  # fmt: skip
    ids = Tokenizer.from_folder(folder).encode(text)
    if len(ids) > tokens:
        raise SpecError(f"is {len(ids)} tokens long", where="method.text", remedy=f"set tokens: {len(ids)}")
    return torch.tensor([ids[place % len(ids)] for place in range(tokens)])


def source(model: Any, folder: Path) -> torch.Tensor:
    """A learned prompt (tokens, hidden) to start another one from; CheckpointError where it does not fit this base.

    A folder of PEFT's multitask prompt tuning gives the prompt that its tasks share, times the mean of their matrices
    (PEFT's AVERAGE_SOURCE_TASKS).
    """
    tensors = files.read_tensors(folder / WEIGHTS)
    tokens, tasks, ranks = (_length(tensors, *place) for place in ((TENSOR, 0), (ROWS, 0), (ROWS, 1)))
    hidden = model.get_input_embeddings().weight.shape[1]
    expected: dict[str, tuple[int, ...]] = {TENSOR: (tokens, hidden)}
    if ROWS in tensors or COLUMNS in tensors:
        expected |= {COLUMNS: (tasks, tokens, ranks), ROWS: (tasks, ranks, hidden)}
    files.require_fit(folder, tensors, expected)
    prompt = tensors[TENSOR].float()
    if ROWS in tensors:
        prompt = prompt * (tensors[COLUMNS].float().mean(0) @ tensors[ROWS].float().mean(0))
    return prompt.to(model.device)


def _length(tensors: dict[str, torch.Tensor], name: str, axis: int) -> int:
    """A tensor's length along an axis; at least 1, so that what is empty or flat does not fit."""
    shape = tensors[name].shape if name in tensors else ()
    return max(1, shape[axis]) if len(shape) > axis else 1


def factored(model: Any, start: torch.Tensor, rank: int) -> Encoded:
    """PEFT's multitask prompt for one task: `start` (tokens, hidden) times a matrix of `rank` that begins as ones.

    The first factors are ones; further ones begin with zero rows and random columns, as LoRA's B and A.
    """
    from peft import MultitaskPromptTuningConfig
    from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

    tokens, hidden = start.shape
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, token_dim=hidden, num_transformer_submodules=1,
        num_ranks=rank, num_tasks=1,
    )  # fmt: skip
    encoder = MultitaskPromptEmbedding(config, model.get_input_embeddings())
    with torch.no_grad():
        encoder.prefix_task_rows.zero_()
        encoder.prefix_task_rows[:, 0] = encoder.prefix_task_cols[..., 0] = 1.0
        encoder.embedding.weight = nn.Parameter(start.float())
    return Encoded(encoder, tokens, task_ids=torch.zeros(1, dtype=torch.long, device=model.device))


@torch.no_grad()
def embeddings_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The base's embeddings (tokens, hidden) of ids: a fresh prompt that says what these tokens say."""
    found: torch.Tensor = model.get_input_embeddings()(ids.to(model.device))
    return found.clone()


def random_key_values(model: Any, shape: Shape) -> torch.Tensor:
    """Normal noise (tokens, width) as large as the keys and the values of each of the base's own layers."""
    real = key_values_of(model, draw_ids(model, shape.tokens), shape)
    if real.is_meta:
        return real
    pairs = shape.split(real)
    spread = pairs.float().std((2, 3, 4), keepdim=True)
    return shape.flatten((spread * torch.randn(pairs.shape).to(spread)).to(real.dtype))


def random_embeddings(model: Any, shape: Shape) -> torch.Tensor:
    """Normal noise (tokens, hidden) of the size of the base's own embeddings."""
    spread = 0.02 if model.device.type == "meta" else float(embeddings_of(model, draw_ids(model, 100)).float().std())
    return (spread * torch.randn(shape.tokens, shape.hidden)).to(shape.dtype)


def key_values_of(model: Any, ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Keys and values (tokens, width) that the base keeps of these tokens: a prefix that says what they say."""
    if model.device.type == "meta":
        return torch.empty(shape.tokens, shape.width, dtype=shape.dtype, device="meta")
    return shape.flatten(torch.stack(_key_values(model, ids)))


@torch.no_grad()
def _key_values(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer keeps of one row of ids: (2, kv heads, tokens, head size)."""
    cache: Any = DynamicCache()  # without the configuration: layers with a window would keep the row's end only
    model.get_decoder()(input_ids=ids.to(model.device)[None], use_cache=True, **{cache_name(model): cache})
    return [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
