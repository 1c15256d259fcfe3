"""Adapters whose layers PEFT swaps into the base: LoRA's family, (IA)^3, orthogonal ones and the rest of its shelf.

Prefix trees never pass through `PeftModel.forward`: `Adapted.model` is the inner transformers model with the adapter's
layers in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, ShiraConfig, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as set_state
from peft.tuners.tuners_utils import BaseTunerLayer

from luthier import contracts, store
from luthier.adapt import allow, butterfly, drawn
from luthier.adapt import folder as files
from luthier.adapt.folder import CONFIG, WEIGHTS
from luthier.errors import CheckpointError, LuthierError, SpecError
from luthier.model.fused import fuse
from luthier.model.quantize import refuse_quantised, require_tolerated, unmarked


class PeftAdapted(contracts.Adapted):
    """A base with one PEFT adapter on it."""

    def __init__(self, wrapped: PeftModel) -> None:
        self.wrapped = wrapped
        self.model = wrapped.get_base_model()
        self._tuner: Any = wrapped.base_model

    @property
    def config(self) -> PeftConfig:
        """What PEFT made of the adapter's settings."""
        return self.wrapped.peft_config["default"]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that learn, by PEFT's name."""
        return {name: p for name, p in self.wrapped.named_parameters() if p.requires_grad}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the bare base."""
        learning = {name for name, p in self.wrapped.named_parameters() if p.requires_grad}
        try:
            with self.wrapped.disable_adapter():
                yield
        finally:
            for name, parameter in self.wrapped.named_parameters():  # PEFT lets all of an adapter's learn again
                parameter.requires_grad_(name in learning)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by the names of the file, on the CPU; numbers with a fraction as float32."""
        # A clone each: safetensors refuses tensors that share memory, as projections common to all layers do.
        return {
            name: (t.detach().float() if t.is_floating_point() else t.detach()).to("cpu", copy=True).contiguous()
            for name, t in self.kept().items()
        }

    def kept(self) -> dict[str, torch.Tensor]:
        """What the file holds, by its names there, as it stands in memory."""
        with _quiet():
            state: dict[str, torch.Tensor] = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        return state

    def saved_bytes(self) -> int:
        """How large the saved tensors are: what is kept beside what learns (positions, fixed halves) counts too."""
        sizes = ((t.numel(), 4 if t.is_floating_point() else t.element_size()) for t in self.kept().values())
        return sum(count * size for count, size in sizes)

    def save(self, folder: Path) -> None:
        """Write PEFT's two files. Saving asks no hub and pickles nothing."""
        files.write(folder, self.settings(), self.tensors(), drawn.notes(self.wrapped))

    def settings(self) -> dict[str, Any]:
        """The configuration as it is written: regular expressions have become the names that they matched."""
        written = self.config.to_dict()
        written["inference_mode"] = True
        if isinstance(written.get("target_modules"), str):
            written["target_modules"] = list(self._tuner.targeted_module_names)
        if isinstance(written.get("exclude_modules"), str):
            written["exclude_modules"] = None
        return {key: sorted(v) if isinstance(v, set) else v for key, v in written.items()}

    def merge(self) -> Any:
        """Fold the adapter into the base for good and return the plain model; SpecError on a quantised base."""
        refuse_quantised(self.model, "merging", "`luthier export` dequantises the base first, or serve it attached")
        with _quiet():
            plain = self.wrapped.merge_and_unload(safe_merge=True)
        return _forget(plain)

    def detach(self) -> Any:
        """Take the adapter off and return the plain base, unchanged."""
        with _quiet(), unmarked(self.model):  # PEFT takes (IA)^3's unload for a merge and refuses it
            plain = self.wrapped.unload()
        return _forget(plain)


Made = Callable[[PeftModel], PeftAdapted]


def attach(model: Any, config: PeftConfig, *, seed: int, made: Made = PeftAdapted) -> PeftAdapted:
    """Put a fresh PEFT adapter on a model; first values are drawn from `seed` and nothing else.

    The adapter keeps the base's dtype: PEFT's float32 copies of every input would double a bf16 step's memory
    (performance section 3); the optimiser keeps the float32 master. SpecError, and the base as it was, where PEFT
    finds the settings impossible for this base.
    """
    _calm()
    require_tolerated(model, config.peft_type)
    if _is_meta(model) and isinstance(config, ShiraConfig):
        config.mask_fn = None  # type: ignore[assignment]  # which entries is drawn; how many is all that a plan asks
    with drawn_from(seed, model), _quiet():
        try:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        except (ValueError, TypeError, RuntimeError, AssertionError, NotImplementedError, IndexError) as error:
            unwrap(model)
            raise _impossible(model, config, error) from error
        except ImportError as error:  # a package that only this type of PEFT's needs
            unwrap(model)
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            package = "scikit-learn" if "scikit" in str(error) else str(error.name or "the package it names")
            raise SpecError(f"{kind}: {error}", where="method.type", remedy=f"pip install {package}") from error
        _keep_dtype(wrapped, model)
        try:
            adapted = made(wrapped)  # type: ignore[arg-type]
        except LuthierError:
            unwrap(model)
            raise
    if not adapted.trainable():
        adapted.detach()
        raise SpecError("the method found nothing to train in this model", where="method.target_modules")
    fuse(adapted.model)
    return adapted


def configure(kind: str, **settings: Any) -> PeftConfig:
    """Make PEFT's configuration of a type; SpecError where its class refuses the settings together."""
    try:
        with _quiet():
            return allow.config_class(kind)(task_type="CAUSAL_LM", **settings)
    except (ValueError, TypeError) as error:
        raise SpecError(f"PEFT's {kind} refuses these options: {error}", where="method") from error


def load(model: Any, folder: Path, *, made: Made = PeftAdapted) -> PeftAdapted:
    """Put a saved adapter on a model; every tensor must be there, fit and be finite, or CheckpointError says which."""
    config = read_config(folder)
    tensors = files.read_tensors(folder / WEIGHTS)
    adapted = attach(model, config, seed=0, made=made)
    try:
        expected = adapted.tensors()
        files.require_fit(folder, tensors, {name: tuple(t.shape) for name, t in expected.items()})
        drawn.require_indices(folder, adapted.wrapped, tensors, expected)
        drawn.require_same(folder, adapted.wrapped)
        with _quiet():
            set_state(adapted.wrapped, dict(tensors))
    except Exception:
        adapted.detach()
        raise
    return adapted


def read_config(folder: Path) -> PeftConfig:
    """Rebuild a clean PEFT configuration from an untrusted folder; what could steer loading is refused."""
    written = store.read_json(folder / CONFIG)
    if not isinstance(written, dict):
        raise CheckpointError("is not a table of settings", where=str(folder / CONFIG))
    return allow.clean(written, str(folder / CONFIG))


@contextmanager
def drawn_from(seed: int, model: Any) -> Iterator[None]:
    """Inside, torch draws from `seed`, on every device that the model lies on; outside, as if nothing had happened."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(devices=sorted(devices, key=str), device_type=kind):
        torch.manual_seed(seed)
        yield


def unwrap(model: Any) -> None:
    """Put back what PEFT had swapped before it gave up."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    _forget(model)


def _impossible(model: Any, config: PeftConfig, error: Exception) -> SpecError:
    kind = str(config.peft_type).rpartition(".")[2]
    if _is_meta(model):
        what = f"the shapes of {kind} follow from the base's weights, which a plan does not read"
        return SpecError(what, where="method", remedy="train to find out, or plan another method")
    what = f"PEFT cannot put {kind} on this base: {error}"
    return SpecError(what, where="method", remedy="other options, or a method that fits this base")


def _is_meta(model: Any) -> bool:
    return any(p.device.type == "meta" for p in model.parameters())


def _calm() -> None:
    """Say once what PEFT would ask for again and again."""
    butterfly.instead_of_compiling()
    invariants = torch.sparse.check_sparse_tensor_invariants
    if not invariants.is_enabled():  # as it is; saying so silences torch, which warns where nothing was said
        invariants.disable()


def _forget(model: Any) -> Any:
    """Take off the mark that PEFT leaves, which would make it warn of a second adapter."""
    with suppress(AttributeError):
        del model.peft_config
    model.requires_grad_(False)
    return model


def _keep_dtype(wrapped: Any, model: Any) -> None:
    """Give what learns its layer's dtype where PEFT made it float32 on a bf16 base: products need equal dtypes."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), None)
    if dtype not in (torch.bfloat16, torch.float16):
        return
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PEFT's advice to its own users off the screen: nothing there can be acted on from a task."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
