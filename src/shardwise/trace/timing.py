"""Seconds of every unit call, by the clock: each call alone, forward and backward, on real parameters.

One forward of the model collects what each call is given; then every call is run again by itself, detached from the
others. Where the model has no values yet, a unit is given its own while it runs, so that one unit is in memory at a
time. Knows the device only as far as it must wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.describe.flow import NodeKind
from shardwise.describe.profile import ModelProfile
from shardwise.errors import ModelError
from shardwise.trace.capture import own
from shardwise.trace.install import Switch, installed
from shardwise.trace.objective import Batch, LossFunction, objective
from shardwise.trace.profile import trace

__all__ = ["measure"]


Values = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]


def measure(
    model: nn.Module,
    batch: Batch,
    *,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
    repeats: int = 5,
    values: Values | None = None,
    device: torch.device | str = "cpu",
) -> ModelProfile:
    """A profile with `forward_s` and `backward_s` of every call: medians of `repeats` runs after one that warms up.

    `values(names)` gives parameters that have no value (meta or fake) theirs, whole, on `device`: a unit's while it
    runs, those that glue reads all along. Gradients, buffers and parameters of the model are left as they were. Raises
    `ModelError` if a parameter has no value and none is given, and where another run makes other calls.
    """
    empty = {id(p): name for name, p in model.named_parameters() if _is_empty(p)}
    if empty and values is None:
        raise ModelError(
            f"timing needs real parameters, and {next(iter(empty.values()))} (of {len(empty)}) has no value; use "
            "trace: it counts flops"
        )
    profile = trace(model, batch, loss=loss, units=units)
    filler = _Filler(empty, values, torch.device(device))
    watcher = _Clock(repeats, filler)
    switch = Switch()
    in_glue = {name for node in profile.flow.nodes if node.kind is not NodeKind.CALL for name in node.parameters}
    with (
        _left_alone(model),
        filler.filled(model, only=in_glue),
        installed({unit.name: model.get_submodule(unit.name) for unit in profile.units}, switch),
        switch.on(watcher),
    ):
        objective(model, own(batch), loss)
    if [unit for unit, _ in watcher.seconds] != [call.unit for call in profile.calls]:
        raise ModelError(
            f"timing runs the unit calls that were traced, but of {len(profile.calls)} calls {len(watcher.seconds)} "
            "ran: the model drops some at random; use trace: it counts flops"
        )
    calls = tuple(
        dataclasses.replace(call, forward_s=forward, backward_s=backward)
        for call, (_, (forward, backward)) in zip(profile.calls, watcher.seconds, strict=True)
    )
    return dataclasses.replace(profile, calls=calls)


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Gradients and buffers (running statistics, counters) are afterwards what they were."""
    gradients = {p: p.grad for p in model.parameters()}
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    for parameter in gradients:
        parameter.grad = None
    for module, own_buffers in buffers:
        module._buffers.update({name: None if b is None else b.clone() for name, b in own_buffers.items()})
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, own_buffers in buffers:
            module._buffers.update(own_buffers)


class _Filler:
    """Gives parameters without values theirs, for the time of a block. `empty`: id of a parameter -> its name."""

    def __init__(self, empty: Mapping[int, str], values: Values | None, device: torch.device) -> None:
        self._empty = empty
        self._values = values
        self._device = device

    @contextlib.contextmanager
    def filled(self, module: nn.Module, *, only: Collection[str] | None = None) -> Iterator[None]:
        """The parameters inside `module`, or of those `only` the ones named, are real in the block."""
        undo: list[tuple[nn.Module, str, nn.Parameter]] = []
        made: dict[int, nn.Parameter] = {}
        for inner in module.modules():
            for leaf, parameter in list(inner._parameters.items()):
                name = self._empty.get(id(parameter))
                if parameter is None or name is None or (only is not None and name not in only):
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = self._made(name, parameter)
                undo.append((inner, leaf, parameter))
                inner._parameters[leaf] = made[id(parameter)]
        try:
            yield
        finally:
            for inner, leaf, parameter in undo:
                inner._parameters[leaf] = parameter

    def _made(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        assert self._values is not None
        value = self._values([name])[name].to(device=self._device, dtype=parameter.dtype)
        return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _is_empty(parameter: nn.Parameter) -> bool:
    return parameter.device.type == "meta" or type(parameter.data) is not torch.Tensor


class _Clock:
    """Runs every unit call several times, detached, and then once for the forward that goes on."""

    def __init__(self, repeats: int, filler: _Filler) -> None:
        self.seconds: list[tuple[str, tuple[float, float]]] = []  # unit, (forward, backward), in the order of calls
        self._repeats = repeats
        self._filler = filler
        self._inside = False

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        if self._inside:
            return body(*args, **kwargs)
        self._inside = True
        try:
            with self._filler.filled(module):
                runs = [_timed(body, args, kwargs) for _ in range(self._repeats + 1)][1:]
                forward, backward = (statistics.median(run[way] for run in runs) for way in (0, 1))
                self.seconds.append((unit, (forward, backward)))
                with torch.no_grad():
                    return body(*args, **kwargs)
        finally:
            self._inside = False


def _timed(body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, float]:
    def alone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return deepcopy(leaf)  # a cache that the call fills must not be full the next time
        copy = leaf.detach().clone()
        return copy.requires_grad_() if copy.is_floating_point() else copy

    args, kwargs = tree_map(alone, (tuple(args), kwargs))
    with torch.enable_grad():
        start = _now()
        output = body(*args, **kwargs)
        middle = _now()
        roots = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        seeds = [torch.ones_like(root) for root in roots]
        begin = _now()
        if roots:
            torch.autograd.backward(roots, seeds)
        end = _now()
    return middle - start, end - begin


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
