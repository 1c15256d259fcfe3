"""A forecast of memory and time before training, from arithmetic and one short measurement of this machine.

The counts are those of performance section 1: a frozen base costs 2 N per token forward and 2 N for the gradient of
its inputs (not 2 N more for its weights), an adapter all three; the head is paid per supervised position only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import ModelError
from luthier.records import Pack
from luthier.training.feed import ShuffledFeed

# Share of the machine's matrix speed that a training step reaches; the rest goes into attention, norms and other
# passes over memory. An expectation, not yet a calibration: an untuned bf16 prototype reached 0.38 (performance section
# 2), a float32 step on a busy core 0.73.
REACHED = (0.35, 0.5, 0.75)
RUNTIME = 450e6  # bytes of interpreter, torch and transformers before any weight
SPREAD = 0.25  # of the memory forecast
CHUNK = 512  # supervised positions whose logits are alive together
LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
SAMPLE = 6  # steps whose packs are planned to learn what sharing will bring


@dataclass(frozen=True)
class ModelFacts:
    """The sizes that cost depends on. `body` counts parameters of all but embedding and head."""

    parameters: int
    body: int
    layers: int
    hidden: int
    feed_forward: int
    vocabulary: int
    bytes_per_weight: int


@dataclass(frozen=True)
class Tally:
    """What a whole run will compute, and its largest pack, in tokens."""

    tokens: int
    plain_tokens: int
    supervised: int
    largest_pack: int
    steps: int


@dataclass(frozen=True)
class Forecast:
    """Expected cost, to be shown as a forecast: seconds lie in [seconds_low, seconds_high] on an idle machine."""

    peak_bytes: int
    peak_bytes_high: int
    seconds: float
    seconds_low: float
    seconds_high: float
    tokens_computed: int
    plain_tokens: int
    gigaflops: float  # of this machine, measured
    steps: int

    @property
    def sharing_factor(self) -> float:
        """How many times fewer tokens are computed than separate rows would need."""
        return self.plain_tokens / max(1, self.tokens_computed)


def facts_of(model: Any) -> ModelFacts:
    """Read the sizes from a loaded transformers model, before an adapter is on it."""
    config = model.config.get_text_config()
    weights = list(model.parameters())
    outer = {
        id(module.weight): module.weight.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    total = sum(weight.numel() for weight in weights)
    return ModelFacts(
        parameters=total,
        body=total - sum(outer.values()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        feed_forward=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        bytes_per_weight=weights[0].element_size(),
    )


def facts_of_folder(folder: Path, *, bytes_per_weight: int = 2) -> ModelFacts:
    """Read the sizes from a model folder without loading it (and without torch): its config and tensor headers."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    shapes = [shape for path in sorted(folder.glob("*.safetensors")) for shape in _shapes(path)]
    if not shapes:
        raise ModelError("holds no safetensors weights", where=str(folder))
    vocabulary, hidden = int(config["vocab_size"]), int(config["hidden_size"])
    outer = sum(math.prod(shape) for shape in shapes if len(shape) == 2 and shape[0] == vocabulary)
    total = sum(math.prod(shape) for shape in shapes)
    return ModelFacts(
        parameters=total,
        body=total - outer,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        feed_forward=int(config.get("intermediate_size") or 4 * hidden),
        vocabulary=vocabulary,
        bytes_per_weight=bytes_per_weight,
    )


def tally(feed: ShuffledFeed, sample: int = SAMPLE) -> Tally:
    """Plan the packs of some steps, spread over the run, and scale up; the feed's position is not touched."""
    total = feed.total_steps
    chosen = sorted({round(i * (total - 1) / max(1, sample - 1)) for i in range(min(sample, total))})
    batches = [feed.batch(step) for step in chosen]
    packs = [pack for batch in batches for pack in batch.packs]
    seen = total / len(batches)
    return Tally(
        tokens=round(seen * sum(len(pack) for pack in packs)),
        plain_tokens=round(seen * sum(pack.plain_tokens for pack in packs)),
        supervised=round(seen * sum(len(pack.target_ids) for pack in packs)),
        largest_pack=max((len(pack) for pack in packs), default=0),
        steps=total,
    )


def tally_packs(packs: Sequence[Pack]) -> Tally:
    """Count packs that are at hand, each computed once."""
    return Tally(
        tokens=sum(len(pack) for pack in packs),
        plain_tokens=sum(pack.plain_tokens for pack in packs),
        supervised=sum(len(pack.target_ids) for pack in packs),
        largest_pack=max((len(pack) for pack in packs), default=0),
        steps=1,
    )


def flops(facts: ModelFacts, trainable: int, work: Tally, *, checkpointing: bool = False) -> float:
    """Floating point operations of a training run."""
    frozen = max(0, facts.body - trainable) if trainable > facts.body // 2 else facts.body
    per_token = (6 if checkpointing else 4) * frozen + (8 if checkpointing else 6) * trainable
    per_target = 4 * facts.vocabulary * facts.hidden
    return float(per_token * work.tokens + per_target * work.supervised)


def peak_bytes(facts: ModelFacts, trainable: int, work: Tally, *, checkpointing: bool = False) -> int:
    """Bytes resident at the worst moment: weights, what backward keeps of the largest pack, logits, optimiser."""
    width = facts.bytes_per_weight
    weights = facts.parameters * width
    if checkpointing:  # one state per layer, and one layer's insides
        kept = (facts.layers * facts.hidden + _kept_per_layer(facts)) * width
    else:
        kept = facts.layers * _kept_per_layer(facts) * width
    logits = 3 * 4 * min(CHUNK, max(1, work.supervised)) * facts.vocabulary
    optimiser = trainable * (4 * 4 + 2 * width)  # master, gradient sum, two moments; parameter and its gradient
    return int(RUNTIME + weights + kept * work.largest_pack + logits + optimiser)


def plan(
    facts: ModelFacts, *, trainable: int, work: Tally, gigaflops: float, checkpointing: bool = False,
    evaluations: int = 0, dev: Tally | None = None,
) -> Forecast:  # fmt: skip
    """Forecast a run of `work`, with `evaluations` looks at the `dev` rows (a forward pass each)."""
    total = flops(facts, trainable, work, checkpointing=checkpointing)
    if dev is not None:
        forward = 2 * (facts.body + trainable) * dev.tokens + 2 * facts.vocabulary * facts.hidden * dev.supervised
        total += evaluations * forward
    low, middle, high = REACHED
    seconds = total / (gigaflops * 1e9)
    peak = peak_bytes(facts, trainable, work, checkpointing=checkpointing)
    return Forecast(
        peak_bytes=peak,
        peak_bytes_high=int(peak * (1 + SPREAD)),
        seconds=seconds / middle,
        seconds_low=seconds / high,
        seconds_high=seconds / low,
        tokens_computed=work.tokens,
        plain_tokens=work.plain_tokens,
        gigaflops=gigaflops,
        steps=work.steps,
    )


def measure(facts: ModelFacts, *, dtype: Any, device: Any = "cpu", seconds: float = 0.25) -> float:
    """This machine's matrix speed in GFLOP/s, on the shape of the model's feed-forward with 512 rows."""
    import torch

    left = torch.ones(512, facts.hidden, dtype=dtype, device=device)
    right = torch.ones(facts.feed_forward, facts.hidden, dtype=dtype, device=device)
    work = 2.0 * left.shape[0] * right.numel()

    def once() -> float:
        begun = time.perf_counter()
        product = torch.nn.functional.linear(left, right)
        float(product[0, 0])  # waits for the device
        return time.perf_counter() - begun

    once()  # the first call chooses kernels
    ends, times = time.perf_counter() + seconds, [once()]
    while time.perf_counter() < ends:
        times.append(once())
    return work / sorted(times)[len(times) // 2] / 1e9


def _shapes(path: Path) -> list[list[int]]:
    """Shapes of the tensors of a safetensors file, from its header: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ModelError("is not a safetensors file", where=str(path))
        header = json.loads(file.read(length))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def _kept_per_layer(facts: ModelFacts) -> int:
    """Numbers that one layer keeps per token for its backward pass, with an adapter on every linear layer.

    Inputs of both norms and their outputs, q, k, v and attention's output, and three feed-forward wide tensors:
    562 KB per token in bf16 for SmolLM2-135M, as measured (performance section 1).
    """
    return 8 * facts.hidden + 3 * facts.feed_forward
