"""How much memory a run will need, counted on the meta device before a weight is loaded.

The base is built and the method attached without numbers, and the step with the largest pack, a look at the dev rows
and an answer are rehearsed (`training.rehearsal`). What remains are a few measured constants: the libraries
themselves, and the holes that an allocator leaves.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from luthier.contracts import Adapted, Method
from luthier.errors import SpecError
from luthier.model import attention
from luthier.model.batch import Batch
from luthier.model.logprob import head_logits, head_logprobs, hidden_states
from luthier.model.quiet import quiet
from luthier.records import Loss, Pack
from luthier.spec import QuantizeSpec, TrainSpec
from luthier.training import moments
from luthier.training.rehearsal import Log, Rehearsal, fused_attention

if TYPE_CHECKING:
    from collections.abc import Iterable

# Resident bytes of a process that trained a model of a hundred thousand parameters: interpreter, torch, transformers,
# PEFT, their kernels. Measured by bench/plan_memory.py on Linux, x86-64; taken for other platforms too.
RUNTIME = 520_000_000
CUDA_CONTEXT = 500_000_000  # kernels and workspaces on the device; not measured here
SMALL = 32 * 2**20  # glibc keeps blocks up to this size in its heap, where they leave holes; larger ones are mapped
HOLES = {"cpu": 0.3, "cuda": 0.1}  # of the blocks that leave holes; 0.28 to 0.37 measured on glibc, cuda not measured
# Recomputing takes and gives back each layer's blocks between blocks that stay, and glibc's heap comes apart: 2.1 to
# 5.1 times what is needed at once, in four measured cases (docs/plan.md).
HOLES_RECOMPUTING = 3.7
FLOAT32 = 4
LOGITS, ACTIVATIONS, GRADIENTS = "logits", "activations", "gradients"


@dataclass(frozen=True)
class Kept:
    """Bytes that a base's weights take: packed or plain, and the constants that unpack them."""

    weights: int
    constants: int
    largest: int  # of one matrix, unpacked for its product; 0 where nothing is packed


@dataclass(frozen=True)
class Rig:
    """A base without numbers with a method on it."""

    model: Any
    adapted: Adapted
    device: str
    kept: Kept
    adapter: int  # bytes of what learns
    aside: int  # other bytes that attaching made: copies of freed tensors, frozen random matrices
    trainable: int
    parameters: int


@dataclass(frozen=True)
class Memory:
    """Expected bytes by part, at the worst moment of a run; `phases` say what each stage would need alone."""

    parts: Mapping[str, int]
    phases: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def bare(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """A model of this configuration without numbers, frozen."""
    from transformers import AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        model: Any = build(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


class Length:
    """What a plan knows of a run before it is one; satisfies `contracts.Evidence`, without rows."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def losses(self, count: int) -> Iterator[Loss]:
        """None: there are no numbers to take a loss of."""
        yield from ()


def rig(
    model: Any, method: Method, *, device: str = "cpu", quantize: QuantizeSpec | None = None, total_steps: int = 1
) -> Rig:
    """Attach a method to a bare model; raise SpecError where it refuses this base."""
    kept, parameters = weigh(model, quantize), sum(p.numel() for p in model.parameters())
    base = [*model.parameters(), *model.buffers()]
    with quiet(), torch.device("meta"), Rehearsal(base, redirect=False) as rehearsal:
        adapted = method.attach(model, seed=0, evidence=Length(total_steps))
    trainable = adapted.trainable()
    rehearsal.rename("adapter", trainable.values())
    if kept.largest:
        _unfuse(model)
    log = rehearsal.log
    adapter = log.bytes_of("adapter")
    return Rig(
        model=adapted.model,
        adapted=adapted,
        device=device,
        kept=kept,
        adapter=adapter,
        aside=sum(log.live().values()) - adapter,
        trainable=sum(weight.numel() for weight in trainable.values()),
        parameters=parameters,
    )


def weigh(model: Any, quantize: QuantizeSpec | None = None) -> Kept:
    """Count a bare model's weights; with `quantize` every matrix but the head is packed."""
    plain = {id(p): p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())}
    if quantize is None or quantize.name == "none":
        return Kept(sum(plain.values()), 0, 0)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear and m is not head]
    weights = [linear.weight for linear in linears]
    outer = sum(plain.values()) - sum(plain[id(weight)] for weight in weights)
    packed = sum(weight.numel() for weight in weights) // (1 if quantize.name == "int8" else 2)
    constants = sum(_constants(weight, quantize) for weight in weights)
    return Kept(outer + packed, constants, max(plain[id(weight)] for weight in weights))


def _constants(weight: torch.Tensor, quantize: QuantizeSpec) -> int:
    """What unpacks one matrix: a float32 a row (int8) or a block; doubled, a byte a block and a float32 per 256."""
    if quantize.name == "int8":
        return FLOAT32 * weight.shape[0]
    blocks = -(-weight.numel() // quantize.block)
    return blocks + FLOAT32 * -(-blocks // 256) if quantize.double else FLOAT32 * blocks


def _unfuse(model: Any) -> None:
    """Packed matrices have no fused LoRA step (`model.fused`): PEFT's own forward runs, and keeps what it keeps."""
    for module in model.modules():
        if "forward" in vars(module) and hasattr(module, "lora_A"):
            del module.forward


def optimiser_bytes(trainable: int, name: str = "adamw", device: str = "cpu") -> int:
    """Float32 master, gradient sum and moments, as `training.optim` keeps them; paged moments lie on the host."""
    used, _ = moments.settle(name, device)
    return 2 * FLOAT32 * trainable + (0 if used.startswith("paged") else _moments(used, trainable))


def _moments(name: str, trainable: int) -> int:
    return int(moments.BYTES[name] * trainable)


def rehearse_step(rig: Rig, pack: Pack, *, checkpointing: bool = False) -> Log:
    """Run forward and backward of one training pack."""
    batch = _batch(pack, rig.device)
    rehearsal = Rehearsal(_known(rig))
    with _in_words(), _training(rig.model, checkpointing), fused_attention(), rehearsal:
        states = hidden_states(rig.model, batch).index_select(0, batch.target_source)
        with rehearsal.named(LOGITS):
            logprobs = head_logprobs(rig.model, states, batch.target_ids)
        rehearsal.rename(ACTIVATIONS)
        rehearsal.log.mark()
        loss = -(logprobs * batch.target_weights).sum()
        penalty = rig.adapted.penalty()
        torch.autograd.backward([loss if penalty is None else loss + penalty])
        learning = rig.adapted.trainable().values()
        rehearsal.rename(GRADIENTS, [weight.grad for weight in learning])
        for weight in learning:
            weight.grad = None
        del states, logprobs, loss, penalty
    return rehearsal.log


def rehearse_look(rig: Rig, pack: Pack) -> Log:
    """Run the forward pass of one dev pack."""
    batch = _batch(pack, rig.device)
    rehearsal = Rehearsal(_known(rig))
    with torch.no_grad(), fused_attention(), rehearsal, rehearsal.named("dev"):
        states = hidden_states(rig.model, batch).index_select(0, batch.target_source)
        head_logprobs(rig.model, states, batch.target_ids)
        del states
    return rehearsal.log


@dataclass(frozen=True)
class Asked:
    """A batch of prompts: `rows` of up to `longest` tokens, of which the first `shared` are the same for all."""

    rows: int
    longest: int
    shared: int
    new: int  # tokens to answer with, at most


def rehearse_answer(rig: Rig, asked: Asked) -> Log:
    """Run a batch's prompts, and one new token for each of its rows."""
    from luthier.model import decode
    from luthier.model.refill import FILL_TOKENS

    if attention.shares_prefixes(rig.model):
        return Log()  # answered row by row with the model's own cache: never the worst moment
    own = max(1, asked.longest - asked.shared)
    rehearsal = Rehearsal(_known(rig))
    with torch.no_grad(), fused_attention(), rehearsal, rehearsal.named("answers"):
        memory = decode.Memory(asked.rows, own + asked.new)
        begin = decode.begin_with(rig.model, [0] * asked.shared)
        for _ in range(asked.rows):
            memory.add(begin)
        ids = torch.zeros(asked.rows, own, dtype=torch.long)
        group, parts = max(1, FILL_TOKENS // own), []
        for first in range(0, asked.rows, group):
            part = decode.forward(rig.model, ids[first : first + group], memory, first=first)
            parts.append(part[:, -1].clone())
        last = torch.cat(parts)
        memory.lengths = [own] * asked.rows
        rehearsal.log.mark()
        head_logits(rig.model, last)
        decode.forward(rig.model, ids[:, :1], memory)
        del memory, begin, part, parts, last, ids
    return rehearsal.log


def rehearse_save(rig: Rig, optimizer: str = "adamw") -> Log:
    """A checkpoint on its way to the disk: a copy of master and moments, and the file's bytes."""
    used, _ = moments.settle(optimizer, rig.device)
    sizes = [FLOAT32 * rig.trainable, *[_moments(used, rig.trainable) // 2] * 2] * 2
    log = Log(kinds=["checkpoint"] * len(sizes))
    log.events = [(block, max(1, size)) for block, size in enumerate(sizes)]
    log.events += [(block, 0) for block in range(len(sizes))]
    return log


def _known(rig: Rig) -> Iterator[torch.Tensor]:
    yield from rig.model.parameters()
    yield from rig.model.buffers()
    yield from rig.adapted.trainable().values()


def _batch(pack: Pack, device: str) -> Batch:
    """The pack's numbers without values, and its tree with them: which tokens see which decides what runs."""
    form = "cascade" if device == "cpu" else "dense"
    batch = Batch.of(pack, "cpu", form)
    names = ("ids", "positions", "target_source", "target_ids", "target_weights", "target_row")
    return replace(batch, **{name: getattr(batch, name).to("meta") for name in names})


@contextmanager
def _in_words() -> Iterator[None]:
    """Refuse a method whose step asks for what is not there: values, or what it would have made of them."""
    try:
        yield
    except (RuntimeError, LookupError) as error:
        what = (
            f"its steps follow from the base's weights, which a plan does not read ({str(error).splitlines()[0][:99]})"
        )
        raise SpecError(what, where="method", remedy="`luthier train` measures what it takes") from error


@contextmanager
def _training(model: Any, checkpointing: bool) -> Iterator[None]:
    model.train()
    if checkpointing:
        attention.recompute_activations(model)
    try:
        yield
    finally:
        model.eval()
        if checkpointing:
            model.gradient_checkpointing_disable()


def peaks(log: Log, small: int = SMALL) -> tuple[Counter[str], Counter[str]]:
    """Bytes by kind when blocks of up to `small` bytes, and larger ones, are at their most."""
    sizes: dict[int, int] = {}
    live = (Counter[str](), Counter[str]())
    sums, most, best = [0, 0], [0, 0], [Counter[str](), Counter[str]()]
    for block, size in log.events:
        change = size or -sizes[block]
        which = int(abs(change) > small)
        if size:
            sizes[block] = size
        live[which][log.kinds[block]] += change
        sums[which] += change
        if sums[which] > most[which]:
            most[which], best[which] = sums[which], live[which].copy()
    return +best[0], +best[1]


def gather(
    rig: Rig, phases: Mapping[str, Log], train: TrainSpec, *, file_bytes: int = 0, runtime: int | None = None,
    lower: int = 0,
) -> Memory:  # fmt: skip
    """Add up a run from its rehearsed phases. `file_bytes`: of weights that are converted while they are loaded;
    `lower`: of frozen lower layers' states that are kept.
    """
    family = "cuda" if rig.device.startswith("cuda") else "cpu"
    parts = {
        "runtime": runtime if runtime is not None else {"cuda": CUDA_CONTEXT, "cpu": RUNTIME}[family],
        "weights": rig.kept.weights,
        "constants": rig.kept.constants,
        "adapter": rig.adapter,
        "aside": rig.aside,
        "optimiser": optimiser_bytes(rig.trainable, train.optimizer, rig.device),
        "unpacked": rig.kept.largest,
        "lower": lower,
    }
    standing = sum(parts.values())
    threshold = 0 if family == "cuda" else SMALL if sys.platform == "linux" else 1 << 62
    found = {name: peaks(log, threshold) for name, log in phases.items()}
    if family == "cuda":  # one pool: all blocks leave holes
        found = {name: (large, Counter()) for name, (_, large) in found.items()}
    for name, (small, _) in found.items():
        recomputing = family == "cpu" and name == "tune" and train.checkpointing
        small["holes"] = int(small.total() * (HOLES_RECOMPUTING if recomputing else HOLES[family]))
    alone = {name: standing + small.total() + large.total() for name, (small, large) in found.items()}
    # A heap does not shrink between phases, mapped blocks come on top: the worst of each, whenever it was.
    parts |= dict(_worst(small for small, _ in found.values()) + _worst(large for _, large in found.values()))
    if family == "cpu":
        alone["load"] = parts["runtime"] + rig.kept.weights + rig.kept.constants + file_bytes
        if alone["load"] > sum(parts.values()):
            parts["loading"] = alone["load"] - sum(parts.values())
    return Memory({name: size for name, size in parts.items() if size}, alone)


def _worst(parts: Iterable[Counter[str]]) -> Counter[str]:
    return max(parts, key=lambda part: part.total(), default=Counter())
