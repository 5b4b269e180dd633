"""Deferred initialisation: a model of any size is built without memory; its values are made later, by name.

A value depends on (seed, name) and on the program that builds the model, never on which others are made:
every rank of every layout gets the same bits. It knows modules, names and recipes; it knows no layout, and
slices nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shardwise.errors import ModelError
from shardwise.trace.build_recorder import BuildRecorder
from shardwise.trace.keys import key_of
from shardwise.trace.placing import held_tensors, named_tensors, place, replace
from shardwise.trace.randomness import python_streams
from shardwise.trace.recipe import Recipe, View
from shardwise.trace.replay import replay

__all__ = ["Blueprint", "defer", "place"]

# Building touches what belongs to the whole process: `random`, numpy's and torch's default generators,
# torch.nn.init.
_BUILDING = RLock()


@dataclass(frozen=True, kw_only=True, eq=False)
class Blueprint:
    """A model without values, and the recipes of its values.

    `module` has fake parameters and buffers (`FakeTensor`s of `fake_mode`) on `device`. `canonical[name]` is
    the first name of a tied parameter or buffer, for every name. Where the build could not be recorded
    `deferred` is False, `reason` says why, and the values are those of a build under `torch.manual_seed`:
    equal on every layout as well, but all of them are in memory.
    """

    module: nn.Module = field(repr=False)
    seed: int
    device: torch.device
    fake_mode: FakeTensorMode
    canonical: Mapping[str, str] = field(repr=False)
    reason: str = ""
    _recipe: Recipe = field(default_factory=Recipe, repr=False)
    _views: Mapping[str, View] = field(default_factory=dict, repr=False)
    _built: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def deferred(self) -> bool:
        return not self.reason

    def materialize(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The initial values of these parameters and buffers: new tensors, whole, on `device`.

        Tied names share one tensor. Each is computed alone, on the CPU, in about its own memory: random ops
        draw from a generator seeded by (seed, canonical name, number of the draw). Memory that the model
        never writes (`torch.empty`) is zero. Raises ModelError for an unknown name and for a tensor made on
        the meta device.
        """
        values: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in self.canonical:
                raise ModelError(f"the model has no parameter or buffer {name!r}; use a name of named_parameters()")
            canonical = self.canonical[name]
            if canonical not in values:
                values[canonical] = self._value(canonical)
        return {name: values[self.canonical[name]] for name in names}

    def _value(self, name: str) -> torch.Tensor:
        if not self.deferred:
            return self._built[name].detach().clone()
        if named_tensors(self.module)[name].device.type == "meta":
            raise ModelError(f"{name!r} was made on the meta device and has no value; build it on {self.device}")
        return _alone(replay(self._recipe, [self._views[name]])[0]).to(self.device)


def defer(factory: Callable[[], nn.Module], *, seed: int, device: torch.device | str = "cpu") -> Blueprint:
    """Builds a new module with `factory()`, recording instead of computing.

    Random ops are keyed by name; draws of `random` and numpy, and values that the factory looks at, are made
    at once under `seed`. Draws with a generator of the factory's own follow it. Plain tensor attributes get
    their values (they have no name to ask for them). Where an op cannot be recorded the module is built for
    real (see `Blueprint.reason`); an error of the factory itself is raised. The factory must make a new
    module: its tensors are replaced.
    """
    device = torch.device(device)
    recorder = BuildRecorder(seed)
    try:
        with _seeded(seed), recorder.recording(), device:
            module = factory()
        return _recorded(module, recorder, seed, device)
    except Exception as error:  # whatever went wrong, a build for real shows whether it was recording
        reason = f"{type(error).__name__}: {error}"
    return _built(factory, seed, device, recorder.fake_mode, reason)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with _BUILDING, python_streams(key_of("build", seed)):
        yield


def _recorded(module: nn.Module, recorder: BuildRecorder, seed: int, device: torch.device) -> Blueprint:
    _all_fake(module, recorder)
    tensors = named_tensors(module)
    canonical = _canonical(tensors)
    views = {name: recorder.view(recorder.fake(tensors[name])) for name in dict.fromkeys(canonical.values())}
    attributes = _attributes(module, {id(tensor) for tensor in tensors.values()})
    held = {name: recorder.view(tensor) for name, tensor in attributes.items()}
    recorder.recipe.assign_keys({name: view.storage for name, view in (views | held).items()}, seed)
    values = {name: _alone(replay(recorder.recipe, [view])[0]).to(device) for name, view in held.items()}
    replace(module, {id(tensor): values[name] for name, tensor in attributes.items()})
    return Blueprint(
        module=module,
        seed=seed,
        device=device,
        fake_mode=recorder.fake_mode,
        canonical=canonical,
        _recipe=recorder.recipe,
        _views=views,
    )


def _built(
    factory: Callable[[], nn.Module], seed: int, device: torch.device, fake_mode: FakeTensorMode, reason: str
) -> Blueprint:
    with _seeded(seed), device:
        module = factory()
    tensors = named_tensors(module)
    canonical = _canonical(tensors)
    built = {name: tensors[name].detach() for name in dict.fromkeys(canonical.values())}
    place(module, {name: fake_mode.from_tensor(tensor) for name, tensor in built.items()})
    return Blueprint(
        module=module,
        seed=seed,
        device=device,
        fake_mode=fake_mode,
        canonical=canonical,
        reason=reason,
        _built=built,
    )


def _canonical(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in tensors.items()}


def _all_fake(module: nn.Module, recorder: BuildRecorder) -> None:
    """Tensors that came from outside of torch's ops become constants of the recipe."""
    real = {name: t for name, t in named_tensors(module).items() if not isinstance(t, FakeTensor)}
    place(module, {name: recorder.fake(tensor) for name, tensor in real.items()})


def _attributes(module: nn.Module, named: Collection[int]) -> dict[str, FakeTensor]:
    """Fake tensors that modules hold as plain attributes, by a name of their place."""
    found: dict[int, tuple[str, FakeTensor]] = {}
    for prefix, child in module.named_modules():
        for name, leaves, _ in held_tensors(child):
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, FakeTensor) and id(leaf) not in named:
                    found.setdefault(id(leaf), (f"{prefix}.{name}[{position}]", leaf))
    return dict(found.values())


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with memory of its own size: a view of a larger storage is copied."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone and not tensor.is_conj() and not tensor.is_neg() else tensor.resolve_conj().clone()
