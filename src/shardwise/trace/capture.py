"""Capture a tape: run the objective once with fake parameters, and leave the model as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from shardwise.errors import ModelError
from shardwise.trace.install import Switch, installed
from shardwise.trace.memos import forget, memos_of
from shardwise.trace.objective import Batch, LossFunction, objective
from shardwise.trace.randomness import Scope, python_streams
from shardwise.trace.record import DataDependent, GlueLooks, Recorder, glue_key
from shardwise.trace.tape import Tape
from shardwise.trace.units import choose_units

__all__ = ["Captured", "Compute", "Faked", "Watch", "capture", "own", "recorded", "without_values"]

_TABLES = frozenset(vars(nn.Module()))  # of parameters, children, hooks: torch's own
Watch = Callable[[Recorder], contextlib.AbstractContextManager[None]]
Compute = Callable[[nn.Module, Any, LossFunction | None], torch.Tensor]


class Captured:
    """A recorder after its forward: the tape, the units, and the fake loss (for a backward)."""

    def __init__(self, recorder: Recorder, units: Mapping[str, nn.Module], loss: torch.Tensor) -> None:
        self.recorder = recorder
        self.units = units
        self.loss = loss
        self.tape: Tape = recorder.tape(loss, tuple(units))


def capture(
    model: nn.Module,
    batch: Batch,
    *,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
    scope: Scope | None = None,
    watch: Watch | None = None,
    backward: bool = True,
    compute: Compute = objective,
) -> Captured:
    """Record one forward and loss of `batch`. Parameters are never read; buffers and attributes are restored.
    `compute(model, batch, loss)` is what is recorded: as often as an attempt is made.

    Modules whose glue looks at values that units compute are closed into units, innermost first; a loss that does
    becomes one function. Raises `ModelError` where that does not help. A forward in which units are found to look at
    what they compute is recorded again. With `watch`, `watch(recorder)` is open around the forward, and around a
    backward too unless that is not wanted.
    """
    whole: set[str] = set()
    looking: set[str] = set()  # units that look at values they compute
    whole_loss = False
    while True:
        chosen = choose_units(model, named=units, whole=whole)
        known = frozenset(looking)
        copy = own(batch)
        try:
            with recorded(model, chosen, scope=scope, looking=looking, whole_loss=whole_loss) as recorder:
                captured = _run(model, copy, loss, recorder, chosen, watch, backward, compute)
            if looking == known:
                return captured
        except GlueLooks as looks:
            if looking != known:
                continue
            if looks.in_loss and not whole_loss:
                whole_loss = True
                continue
            if not looks.module or looks.module in whole:
                raise ModelError(
                    f"the glue between units must not look at a value that a unit computed: {looks}; name a module "
                    "around it as a unit"
                ) from looks
            whole.add(looks.module)
        except Exception:  # of the model: an attempt that failed may have left it in a state that it does not expect
            if looking == known:
                raise


def _run(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    recorder: Recorder,
    units: Mapping[str, nn.Module],
    watch: Watch | None,
    backward: bool,
    compute: Compute,
) -> Captured:
    """One forward, and a backward if it is watched and wanted."""
    with python_streams(glue_key(recorder.scope)), watch(recorder) if watch else contextlib.nullcontext():
        before = _host_state()
        value = compute(model, batch, loss)
        captured = Captured(recorder, units, value)
        captured.tape.host_random = not _same(before, _host_state())
        captured.tape.memos = memos_of(model)
        if watch is not None and backward and value.requires_grad:
            recorder.running.phase = "backward"
            with contextlib.suppress(*DataDependent):  # what it has not reached is estimated
                torch.autograd.backward([value])
    return captured


def _host_state() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state(legacy=True)


def _same(before: tuple[Any, Any], after: tuple[Any, Any]) -> bool:
    return before[0] == after[0] and before[1][2] == after[1][2] and bool(np.array_equal(before[1][1], after[1][1]))


@contextlib.contextmanager
def recorded(
    model: nn.Module,
    units: Mapping[str, nn.Module],
    *,
    scope: Scope | None = None,
    looking: set[str] | None = None,
    whole_loss: bool = False,
) -> Iterator[Recorder]:
    """The model with fake parameters, copied buffers and watched units; everything is put back at the end."""
    modules = {module: name for name, module in model.named_modules()}
    switch = Switch()
    with without_values(model) as faked:
        recorder = Recorder(
            parameters=faked.parameters,
            buffers=faked.buffers,
            modules=modules,
            fake=faked.mode,
            scope=scope or Scope(seed=0, step=0, micro_batch=0, samples=(), place="glue", call=0),
            looking=looking,
            whole_loss=whole_loss,
        )
        with installed(units, switch), switch.on(recorder), recorder.active():
            yield recorder


@dataclasses.dataclass(frozen=True, slots=True)
class Faked:
    """A model without values: the mode of its fake parameters, and names of parameters and buffers by their ids."""

    mode: FakeTensorMode
    parameters: Mapping[int, str]
    buffers: Mapping[int, str]


@contextlib.contextmanager
def without_values(model: nn.Module) -> Iterator[Faked]:
    """The model with fake parameters and copied buffers; everything is put back at the end."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    names: dict[int, str] = {}
    buffers: dict[int, str] = {}
    with (
        _memos_empty(model),
        _attributes_restored(model),
        _fake_parameters(model, fake, names),
        _copied_buffers(model, buffers),
    ):
        yield Faked(fake, names, buffers)


@contextlib.contextmanager
def _memos_empty(model: nn.Module) -> Iterator[None]:
    """Nothing is remembered from before, and nothing without values is left for those that come after."""
    memos = memos_of(model)
    forget(memos)
    try:
        yield
    finally:
        forget(memos)


def own(batch: Batch) -> Any:
    """A copy of the batch, so that glue which writes into it in place leaves the caller's alone."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, batch)


@contextlib.contextmanager
def _fake_parameters(model: nn.Module, fake: FakeTensorMode, names: dict[int, str]) -> Iterator[None]:
    fakes: dict[int, nn.Parameter] = {}
    undo: list[tuple[nn.Module, str, nn.Parameter]] = []
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                twin = _fake_twin(parameter, fake)
                fakes[id(parameter)] = twin
                names[id(twin)] = canonical[id(parameter)]
            undo.append((module, name, parameter))
    for module, name, parameter in undo:
        module._parameters[name] = fakes[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in undo:
            module._parameters[name] = parameter


def _fake_twin(parameter: nn.Parameter, fake: FakeTensorMode) -> nn.Parameter:
    """A parameter without memory, on the device of `parameter`; the CPU if that is on meta."""
    device = torch.device("cpu") if parameter.device.type == "meta" else parameter.device
    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
    twin = FakeTensor(fake, empty, device).requires_grad_(parameter.requires_grad)
    twin._is_param = True  # what makes any tensor an nn.Parameter
    return cast(nn.Parameter, twin)


@contextlib.contextmanager
def _copied_buffers(model: nn.Module, names: dict[int, str]) -> Iterator[None]:
    undo: list[tuple[nn.Module, str, torch.Tensor]] = []
    copies: dict[int, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.device.type == "meta":
                raise ModelError(
                    f"buffers are computed for real, parameters are not: buffer {name!r} of {prefix or 'the model'} is "
                    "on the meta device; build the model with sw.defer(factory)"
                )
            undo.append((module, name, buffer))
            if id(buffer) not in copies:
                copies[id(buffer)] = buffer.detach().clone()
                names[id(copies[id(buffer)])] = f"{prefix}.{name}" if prefix else name
            module._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for module, name, buffer in undo:
            module._buffers[name] = buffer


@contextlib.contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Plain attributes that the forward sets (counters, caches) are put back: a trace is not a step."""
    kept = [(module, dict(vars(module))) for module in model.modules()]
    boxes = [(value, value.copy()) for _, attributes in kept for value in _containers(attributes)]
    hooks = [(module, module._forward_hooks.copy()) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in kept:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)
        for box, content in boxes:
            box.clear()
            (box.extend if isinstance(box, list) else box.update)(content)
        for module, before in hooks:
            module._forward_hooks.clear()
            module._forward_hooks.update(before)


def _containers(attributes: Mapping[str, Any]) -> list[Any]:
    """Lists, dictionaries and sets among a module's plain attributes."""
    return [v for name, v in attributes.items() if name not in _TABLES and type(v) in (list, dict, set)]
