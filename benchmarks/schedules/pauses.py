"""A model whose stages compute nothing and take a given time: the three products of a layer sleep their cost.

    F sleeps in the layer's output, I in the gradient of its input, W in the gradient of its weight

The layers are tiny `nn.Linear`; what sleeps is shardwise's own table of their products, so that whole backwards,
split ones and sums in place all pay through the code that real layers run. Emulation: nothing here measures compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from shardwise.execute import layer_forwards, weight_sums
from shardwise.execute.layer_products import Linear
from shardwise.schedule import Costs, Kind

__all__ = ["WIDTH", "Pausing", "emulating", "set_costs", "sleep_until", "wake_sharply", "waking_sharply"]

WIDTH = 8
_PR_SET_TIMERSLACK = 29
_SPIN_S = 60e-6  # the end of a pause is waited for awake: a sleeper wakes some 50 us late

Seconds = Mapping[int, tuple[float, float, float]]  # id of a weight -> of output, input gradient, weight gradient


class Pausing(nn.Module):
    """One layer a stage, and the mean square of what comes out; x and labels (samples, WIDTH)."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Layer() for _ in range(num_stages))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x - labels).square().mean()


class _Layer(nn.Module):
    """y = W (x + shift): the input of the product always has a gradient, also on the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x + self.shift)
        return out


class _Sleeping(Linear):
    """The products of a linear layer, each behind a pause; weights that are not in `seconds` take none."""

    seconds: Seconds = {}  # noqa: RUF012  replaced as a whole

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        _pause(self.seconds, weight, 0)
        return super().output(x, weight, bias)

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        _pause(self.seconds, weight, 1)
        return super().input_gradient(dy, x, weight)

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        _pause(self.seconds, weight, 2)
        return super().weight_gradient(dy, x, weight)

    def add_weight_gradient(self, into: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        _pause(self.seconds, weight, 2)
        super().add_weight_gradient(into, dy, x, weight)


@contextlib.contextmanager
def emulating() -> Iterator[None]:
    """Linear layers of any size that are laid out in this block have products that can sleep."""
    forwards: Any = layer_forwards
    sums: Any = weight_sums
    before = forwards.Linear, sums.SMALLEST
    forwards.Linear, sums.SMALLEST = _Sleeping, 0
    try:
        yield
    finally:
        forwards.Linear, sums.SMALLEST = before
        _Sleeping.seconds = {}


def set_costs(parameters: Mapping[str, nn.Parameter], costs: Costs) -> None:
    """The stages of these parameters pause as `costs` says, from now on."""
    kinds = (Kind.F, Kind.I, Kind.W)
    _Sleeping.seconds = {
        id(parameter): tuple(costs.compute_seconds[kind][int(name.split(".")[1])] for kind in kinds)  # type: ignore[misc]
        for name, parameter in parameters.items()
        if name.endswith("linear.weight")
    }


def wake_sharply() -> None:
    """Let the kernel wake this thread when it asked for, not up to 50 us later."""
    ctypes.CDLL("libc.so.6").prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


@contextlib.contextmanager
def waking_sharply() -> Iterator[bool]:
    """In the block, this thread wakes up sharply, and other programs do not delay it (where this user may ask for that:
    the block is told whether it was granted)."""
    wake_sharply()
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        granted = True
    except PermissionError:
        granted = False
    try:
        yield granted
    finally:
        os.sched_setscheduler(0, *before)


def sleep_until(deadline: float) -> None:
    """Until the clock shows `deadline` (seconds of time.perf_counter)."""
    left = deadline - time.perf_counter() - _SPIN_S
    if left > 0:
        time.sleep(left)
    while time.perf_counter() < deadline:
        pass


def _pause(seconds: Seconds, weight: torch.Tensor, which: int) -> None:
    known = seconds.get(id(weight))
    if known is not None:
        sleep_until(time.perf_counter() + known[which])
