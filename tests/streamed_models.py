"""Models for a streamed verification, importable on ranks: a large one, one that a layout does not keep; and what
measures and bounds the memory of a rank.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.launch import RankContext
from shardwise.verify.sides import Side


class Deep(nn.Module):
    """depth x (width^2 + 3 width) parameters; (batch, width) -> a loss."""

    def __init__(self, *, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * ctx.factor, None, None


class KnowsTheRanks(nn.Module):
    """Layer `broken` of several scales its output, or its gradient alone, where there is more than one rank."""

    def __init__(self, *, broken: int, backward_only: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(5))
        self.layers[broken].factors = (1.0 if backward_only else 1.1, 1.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.factors = (1.0, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        several = dist.is_initialized() and dist.get_world_size() > 1
        return _Scaled.apply(torch.tanh(self.linear(x)), *(self.factors if several else (1.0, 1.0)))


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak_bytes(context: RankContext, function: Callable[..., Side], *args: Any) -> tuple[int, Side]:
    """By how much this process grew, at most, while `function` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _status_bytes("VmRSS")
    side = function(context, *args)
    return _status_bytes("VmHWM") - before, side


def with_at_most(context: RankContext, more_bytes: int, function: Callable[..., Side], *args: Any) -> Side | None:
    """What `function` returns in a process that may allocate `more_bytes`; None where that is too little."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_status_bytes("VmData") + more_bytes, limits[1]))
    try:
        return function(context, *args)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
