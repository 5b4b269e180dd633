"""What moves bytes, to be timed: streams, what blocks do between products, updates, and tiny kernels.

    stream      a sum of two tensors into a third, from what fits a cache to what does not
    between     activations, norms and their gradients, which on some devices compute longer than they read and write
    update      an optimizer's pass over what it updates, and those over gradients for their norm
    launch      what one operation of a module costs when its tensors are tiny: the program's part of every kernel

Knows torch and sizes; refuses to know the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.describe.kernels import Kernel, KernelKind, Phase
from shardwise.describe.measured import TINY, UPDATE
from shardwise.trace.probe_case import Case, Run

__all__ = ["between", "launch", "stream", "update"]

_WIDTH = 256  # of a row


def stream(numel: int, device: torch.device) -> Case:
    """Of float32."""

    def make() -> Run:
        a, b, out = (torch.ones(numel, device=device) for _ in range(3))
        return lambda: torch.add(a, b, out=out)

    kernel = Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=12 * numel)
    return Case(kernel=kernel, make=make, what="sum of two tensors")


def update(numel: int, device: torch.device) -> Case:
    """AdamW on eight matrices in float32, and the norm of their gradients: reads parameters, gradients twice, and both
    moments; writes parameters, moments and zeros for the next gradients."""

    def make() -> Run:
        parameters = [nn.Parameter(torch.zeros(_WIDTH, numel // 8 // _WIDTH, device=device)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

        def run() -> object:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            optimizer.step()
            torch._foreach_zero_(gradients)
            return norm

        return run

    kernel = Kernel(kind=KernelKind.MEMORY, phase=Phase.WEIGHT, dtype="float32", nbytes=9 * 4 * numel)
    return Case(kernel=kernel, make=make, what=UPDATE)


def between(numel: int, device: torch.device) -> Iterator[Case]:
    """Activations, norms and their gradients on rows of `_WIDTH`."""

    def made(function: Callable[[torch.Tensor], torch.Tensor], *, backward: bool) -> Callable[[], Run]:
        def make() -> Run:
            x = torch.randn(numel // _WIDTH, _WIDTH, device=device, requires_grad=backward)  # (rows, width)
            if not backward:
                return lambda: function(x)
            out = function(x)
            seed = torch.ones_like(out)
            return lambda: torch.autograd.grad(out, x, seed, retain_graph=True)

        return make

    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu": F.gelu,
        "softmax": lambda x: x.softmax(-1),
        "layer norm": lambda x: F.layer_norm(x, (_WIDTH,)),
    }
    for name, function in functions.items():
        for backward in (False, True):
            kernel = Kernel(
                kind=KernelKind.MEMORY,
                phase=Phase.INPUT if backward else Phase.FORWARD,
                dtype="float32",
                nbytes=(12 if backward else 8) * numel,
            )
            yield Case(kernel=kernel, make=made(function, backward=backward), what=name)


class _Tiny(nn.Module):
    """What most blocks are made of, at sizes whose arithmetic takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations that run a kernel: views only make names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))


def launch(device: torch.device) -> Case:
    """Forward and backward of a tiny block: seconds over the number of its kernels."""

    def make() -> Run:
        module = _Tiny().to(device)
        x = torch.zeros(1, 2, 8, device=device, requires_grad=True)  # (batch, tokens, width)

        def run() -> object:
            module.zero_grad()
            return module(x).sum().backward()

        return run

    kernel = Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=2 * 2 * 8 * 4)
    return Case(kernel=kernel, make=make, what=TINY, count=_kernels_of)


def _kernels_of(run: Run) -> int:
    with _Counting() as counting:
        run()
    return int(counting.kernels)
