"""Seconds of every unit call, by the clock: each call alone, forward and backward, on real parameters.

One forward of the model collects what each call is given; then every call is run again by itself, detached from the
others. Knows the device only as far as it must wait for it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.describe.profile import ModelProfile
from shardwise.errors import ModelError
from shardwise.trace.capture import own
from shardwise.trace.install import Switch, installed
from shardwise.trace.objective import Batch, LossFunction, objective
from shardwise.trace.profile import trace

__all__ = ["measure"]


def measure(
    model: nn.Module,
    batch: Batch,
    *,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
    repeats: int = 5,
) -> ModelProfile:
    """A profile with `forward_s` and `backward_s` of every call: medians of `repeats` runs after one that warms up.

    The model's gradients are left alone. Raises `ModelError` if a parameter has no value (meta or fake).
    """
    empty = [
        name for name, p in model.named_parameters() if p.device.type == "meta" or type(p.data) is not torch.Tensor
    ]
    if empty:
        raise ModelError(
            f"timing needs real parameters, and {empty[0]} (of {len(empty)}) has no value; use trace: it counts flops"
        )
    profile = trace(model, batch, loss=loss, units=units)
    watcher = _Clock(repeats)
    switch = Switch()
    gradients = {p: p.grad for p in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    with installed({unit.name: model.get_submodule(unit.name) for unit in profile.units}, switch), switch.on(watcher):
        objective(model, own(batch), loss)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    calls = tuple(
        dataclasses.replace(call, forward_s=forward, backward_s=backward)
        for call, (forward, backward) in zip(profile.calls, watcher.seconds, strict=True)
    )
    return dataclasses.replace(profile, calls=calls)


class _Clock:
    """Runs every unit call several times, detached, and then once for the forward that goes on."""

    def __init__(self, repeats: int) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._repeats = repeats
        self._inside = False

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        if self._inside:
            return body(*args, **kwargs)
        self._inside = True
        try:
            runs = [_timed(body, args, kwargs) for _ in range(self._repeats + 1)][1:]
            self.seconds.append((statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)))
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
