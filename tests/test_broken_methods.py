"""Every law can fail: one deliberately broken method for each, which that law catches."""

from __future__ import annotations

from contextlib import contextmanager

import laws
import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier import registry
from luthier.adapt.folder import CONFIG, WEIGHTS
from luthier.contracts import Adapted


def lora():
    return registry.make("methods", {"name": "lora", "rank": 4})


class Wrapped(Adapted):
    """A good adapter; subclasses spoil one thing each."""

    def __init__(self, inner) -> None:
        self.inner, self.model = inner, inner.model

    def trainable(self):
        return self.inner.trainable()

    def disabled(self):
        return self.inner.disabled()

    def save(self, folder):
        self.inner.save(folder)

    def saved_bytes(self):
        return self.inner.saved_bytes()

    def merge(self):
        return self.inner.merge()

    def detach(self):
        return self.inner.detach()


class Method:
    """LoRA, spoilt by a class of `Wrapped` or by a function that is given the adapted model."""

    fresh, not_merged, learning_rate = "exact", "", 1e-3

    def __init__(self, wrap=Wrapped, spoil=None) -> None:
        self.wrap, self.spoil = wrap, spoil

    def attach(self, model, *, seed, evidence=None):
        adapted = self.wrap(lora().attach(model, seed=seed))
        if self.spoil:
            self.spoil(adapted)
        return adapted

    def load(self, model, folder):
        adapted = self.wrap(lora().load(model, folder))
        if self.spoil:
            self.spoil(adapted)
        return adapted

    def groups(self, names):
        return {}


def make(wrap=Wrapped, spoil=None):
    return lambda: Method(wrap, spoil)


def caught(law, *arguments, error=AssertionError) -> None:
    with pytest.raises(error):
        law(*arguments)


def test_the_unspoilt_one_passes(tmp_path):
    good = make()
    for law in (
        laws.fresh_changes_nothing, laws.it_learns, laws.only_the_adapter_learns,
        laws.disabled_and_detached_are_the_base, laws.first_values_come_from_the_seed_alone, laws.merged_equals_attached,
        laws.trees_equal_separate_rows, laws.generation_is_the_models_own,
    ):  # fmt: skip
        law(good)
    for index, law in enumerate(
        (laws.saved_and_loaded_is_the_same, laws.peft_alone_loads_it_or_names_luthier, laws.it_survives_a_kill)
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        law(good, folder)


@torch.no_grad()
def start_elsewhere(adapted):
    for name, parameter in adapted.trainable().items():
        if "lora_B" in name:
            parameter.fill_(0.01)


def test_fresh():
    caught(laws.fresh_changes_nothing, make(spoil=start_elsewhere))


@torch.no_grad()
def start_dead(adapted):
    for parameter in adapted.trainable().values():
        parameter.zero_()  # the gradient of either factor is a product with the other one


def test_learns():
    caught(laws.it_learns, make(spoil=start_dead))


class Leaks(Wrapped):
    """Moves the base's weights at every step."""

    def stepped(self, done, total, gradients):
        self.model.model.norm.weight.add_(1e-3)
        return ()


class Frees(Wrapped):
    """Leaves a weight of the base open to the optimiser that nobody asked for."""

    def trainable(self):
        found = self.inner.trainable()
        self.model.model.norm.weight.requires_grad_(True)
        return found


@pytest.mark.parametrize("wrap", [Leaks, Frees])
def test_only_the_adapter_learns(wrap):
    caught(laws.only_the_adapter_learns, make(wrap))


class StaysOn(Wrapped):
    @contextmanager
    def disabled(self):
        yield


class DetachesByMerging(Wrapped):
    def detach(self):
        return self.inner.merge()


@pytest.mark.parametrize("wrap", [StaysOn, DetachesByMerging, Leaks])
def test_disabled_and_detached_are_the_base(wrap):
    caught(laws.disabled_and_detached_are_the_base, make(wrap))


@torch.no_grad()
def draw_from_the_caller(adapted):
    for parameter in adapted.trainable().values():
        parameter.add_(torch.randn_like(parameter))


def draw_and_hide(adapted):
    torch.rand(1)  # the values are right, but the caller's generator has moved


@pytest.mark.parametrize("spoil", [draw_from_the_caller, draw_and_hide])
def test_first_values_come_from_the_seed_alone(spoil):
    caught(laws.first_values_come_from_the_seed_alone, make(spoil=spoil))


class Rounds(Wrapped):
    def save(self, folder):
        self.inner.save(folder)
        tensors = load_file(folder / WEIGHTS)
        save_file({name: tensor.half().float() for name, tensor in tensors.items()}, folder / WEIGHTS)


class LeavesMore(Wrapped):
    def save(self, folder):
        self.inner.save(folder)
        (folder / "optimizer.bin").write_bytes(b"")


class Boasts(Wrapped):
    def saved_bytes(self):
        return self.inner.saved_bytes() // 2


@pytest.mark.parametrize("wrap", [Rounds, LeavesMore, Boasts])
def test_saved_and_loaded_is_the_same(wrap, tmp_path):
    caught(laws.saved_and_loaded_is_the_same, make(wrap), tmp_path)


class NamesItsOwnWay(Wrapped):
    """Pretends to PEFT's type with another scale than the one it used."""

    def save(self, folder):
        self.inner.save(folder)
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 4'))


class UnknownToAll(Wrapped):
    """A type that neither PEFT nor luthier's name explains."""

    def save(self, folder):
        self.inner.save(folder)
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(text.replace('"LORA"', '"MYSTERY"'))


@pytest.mark.parametrize("wrap", [NamesItsOwnWay, UnknownToAll])
def test_peft_alone_loads_it_or_names_luthier(wrap, tmp_path):
    caught(laws.peft_alone_loads_it_or_names_luthier, make(wrap), tmp_path, error=Exception)


class MergesHalf(Wrapped):
    def merge(self):
        with torch.no_grad():
            for name, parameter in self.inner.trainable().items():
                if "lora_B" in name:
                    parameter.mul_(0.5)
        return self.inner.merge()


def test_merged_equals_attached():
    caught(laws.merged_equals_attached, make(MergesHalf))


def mix_neighbours(adapted):
    """A layer that lets every token see the one before it in memory, which in a pack may be a stranger."""
    adapted.model.model.layers[1].mlp.register_forward_hook(
        lambda module, inputs, out: out + 0.1 * torch.roll(out, 1, 1)
    )


def count_tokens(adapted):
    """A layer that depends on how many tokens came in one call."""
    adapted.model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: out * (1 + out.shape[1] / 100))


@pytest.mark.parametrize("spoil", [mix_neighbours, count_tokens])
def test_trees_equal_separate_rows(spoil):
    caught(laws.trees_equal_separate_rows, make(spoil=spoil))


def test_generation_is_the_models_own():
    caught(laws.generation_is_the_models_own, make(spoil=count_tokens))


class Forgets(Wrapped):
    """Lets the gradient steer something that no checkpoint keeps."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.average = 0.0

    def stepped(self, done, total, gradients):
        name, gradient = next(iter(gradients.items()))
        self.average = 0.9 * self.average + float(gradient.norm())
        parameter = self.trainable()[name]
        with torch.no_grad():
            parameter.mul_(1 - 1e-3 * self.average)
        return (name,)


class Remembers(Forgets):
    def state(self):
        return {"average": torch.tensor(self.average, dtype=torch.float64)}

    def restore(self, state):
        self.average = float(state["average"])


def test_it_survives_a_kill(tmp_path):
    laws.it_survives_a_kill(make(Remembers), tmp_path / "good")
    caught(laws.it_survives_a_kill, make(Forgets), tmp_path / "bad")


class Careless(Method):
    """Loads whatever fits and leaves the rest at random."""

    def load(self, model, folder):
        adapted = lora().attach(model, seed=0)
        tensors = {name.replace(".weight", ".default.weight"): t for name, t in load_file(folder / WEIGHTS).items()}
        adapted.wrapped.load_state_dict(tensors, strict=False)
        return adapted


@pytest.mark.parametrize("damage", ["missing", "extra", "nan", "other_base"])
def test_what_does_not_fit_is_refused(damage, tmp_path):
    caught(laws.damage_is_refused, Careless, tmp_path, damage)
