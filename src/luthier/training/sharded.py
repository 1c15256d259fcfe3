"""A base in parts: each process holds a share of every layer (FSDP2), and puts a layer together while it runs.

The matrices of the layers are shared out. All else stays whole in every process: what learns (an adapter is small, and
its gradient is summed as it always is), norms and biases, and the embeddings and the head outside the layers. Layers
are called through the body, whose hooks fire however the body is reached (prefix trees call it without the model's own
forward).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from luthier.contracts import Adapted, Evidence, Method
from luthier.errors import LuthierError, SpecError
from luthier.model.passing import layers_of

WHERE = "train.sharding"
REMEDY = "train.sharding: none, or a method whose own parameters stand beside the layers, such as lora"


def shard(model: Any, device: torch.device | str) -> None:
    """Share a base's layers out over all processes, in place; the rest goes to `device` whole.

    A model that was loaded on the CPU never has more than one whole layer on a GPU. Raises SpecError where its layers
    are not known or several processes are not there.
    """
    layers = layers_of(model)
    if not layers:
        raise SpecError(
            f"the layers of {type(model).__name__} are not known", where=WHERE, remedy="train.sharding: none"
        )
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        raise SpecError("`full` needs several processes", where=WHERE, remedy="train.processes: 2 or more, or auto")
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.dim() < 2})
    body = model.get_decoder()
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})
    model.to(device)


def attach(method: Method, model: Any, *, seed: int, evidence: Evidence | None) -> Adapted:
    """Attach a method to a base in parts; SpecError where it must read or tune whole matrices of the layers."""
    name = type(method).__module__.rpartition(".")[2]
    reads = SpecError(f"the method '{name}' reads the base's matrices, which lie in parts", where=WHERE, remedy=REMEDY)
    before = {id(tensor) for tensor in _in_parts(model)}
    try:
        adapted = method.attach(model, seed=seed, evidence=evidence)
    except (LuthierError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        if isinstance(error, LuthierError) and "DTensor" not in str(error):
            raise
        raise reads from error
    if any(isinstance(parameter, DTensor) for parameter in adapted.trainable().values()):
        raise SpecError(f"the method '{name}' tunes the layers' own matrices", where=WHERE, remedy=REMEDY)
    if any(id(tensor) not in before for tensor in _in_parts(adapted.model)):
        raise reads
    return adapted


def _in_parts(model: Any) -> list[DTensor]:
    """The model's tensors of which this process holds a part."""
    return [t for found in (model.parameters(), model.buffers()) for t in found if isinstance(t, DTensor)]


def held_bytes(model: Any) -> int:
    """Bytes of parameters that this process holds between two steps."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
