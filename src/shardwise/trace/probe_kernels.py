"""Single operations by the clock, as the kernels that a price is made of: products, attention, streams of memory.

    products    x (m, k) with w (n, k): forward x·wᵀ (m, n); gradients dy·w (m, k) and dyᵀ·x (n, k)
    attention   fused, causal, forward and backward
    memory      a sum of two tensors into a third, from what fits a cache to what does not; and what blocks do between
                products, which on some devices computes longer than it reads and writes
    update      an optimizer's pass over what it updates, and that over gradients for their norm
    launch      what one operation of a module costs when its tensors are tiny: the program's part of every kernel

Every operation is repeated for a while, so that ranks which share cores all get their turns. Knows torch and one
device; refuses to know ranks and what is fitted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.describe.kernels import Kernel, KernelKind, Phase

__all__ = ["TINY", "UPDATE", "Case", "cases", "seconds_of", "seconds_of_all"]

# (m, n, k): tokens, outputs, inputs of a linear
_SHAPES = (
    (64, 64, 64),
    (128, 128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
    (128, 512, 128),
    (512, 192, 768),
    (256, 8192, 128),  # a vocabulary
    (2048, 256, 64),
)
_OF_A_GPU = ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (4096, 16384, 4096), (8192, 1024, 8192))
_QUICK = ((64, 64, 64), (256, 256, 256), (512, 512, 512))
_STREAMS = (1 << 12, 1 << 16, 1 << 20, 1 << 24)  # elements of float32: 16 KiB to 64 MiB a tensor
_BETWEEN = (1 << 15, 1 << 18)  # elements of what stands between products
_UPDATED = (1 << 19, 1 << 22)  # parameters
_WIDTH = 256  # of a row of them
_CAUSAL = 0.5  # of the scores

TINY = "of a tiny block"
UPDATE = "update of parameters"

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel; `make` allocates what it works on, and gives what is timed, which is `count` of the kernel."""

    kernel: Kernel
    make: Callable[[], Run]
    what: str = ""
    count: Callable[[Run], int] = lambda run: 1


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """What is measured, the same on every rank."""
    on_gpu = device.type == "cuda"
    shapes = _QUICK if quick else (*_SHAPES, *(_OF_A_GPU if on_gpu else ()))
    yield _launch(device)
    for shape in shapes:
        for phase in Phase:
            yield _product(shape, phase, torch.float32, device)
    for dtype in (torch.bfloat16,) if quick or not on_gpu else (torch.bfloat16, torch.float16):
        for shape in shapes[-1:] if quick else (shapes if on_gpu else shapes[1:5]):
            yield _product(shape, Phase.FORWARD, dtype, device)
    yield _batched(16, 128, 128, 32, device)
    for tokens, width in ((128, 32),) if quick else ((128, 32), (256, 64), (1024, 64)):
        yield from _attention(8, tokens, width, torch.bfloat16 if on_gpu else torch.float32, device)
    for numel in _STREAMS[1::2] if quick else _STREAMS:
        yield _stream(numel, device)
    for numel in _UPDATED[:1] if quick else _UPDATED:
        yield _update(numel, device)
    for numel in _BETWEEN[:1] if quick else _BETWEEN:
        yield from _between(numel, device)


def seconds_of_all(
    device: torch.device,
    *,
    window_s: float,
    quick: bool = False,
    first: bool = True,
    together: Callable[[], None] | None = None,
    shared: float = 1.0,
) -> list[tuple[float, float]]:
    """Of one kernel of every case, in their order: where one rank computes it alone, and where all do at once.

    `together` waits for all ranks; without it there is one. The `first` rank computes alone; the others' first number
    is 0. Ranks that share a core with others take `shared` times as long a window: it has turns of all.
    """
    found = []
    for case in cases(device, quick=quick):
        run = case.make()
        run()
        if together is not None:
            together()
        alone_s = seconds_of(run, device, window_s=window_s) if first else 0.0
        at_once_s = alone_s
        if together is not None:
            together()
            at_once_s = seconds_of(run, device, window_s=window_s * shared)
        count = case.count(run)
        found.append((alone_s / count, at_once_s / count))
    return found


def seconds_of(run: Run, device: torch.device, *, window_s: float) -> float:
    """Of one `run`: the mean over those that fit into `window_s`, at least one, after one that warms up."""
    begin = _now(device)
    run()
    once_s = _now(device) - begin
    each = max(1, int(window_s / 8 / max(once_s, 1e-9)))  # between two looks at the clock
    runs, start = 0, _now(device)
    while True:
        for _ in range(each):
            run()
        runs += each
        passed_s = _now(device) - start
        if passed_s >= window_s:
            return passed_s / runs


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- products -----------------------------------------------------------------------------------------


def _product(shape: tuple[int, int, int], phase: Phase, dtype: torch.dtype, device: torch.device) -> Case:
    """One of the three products of a linear, at (rows, columns, depth) of its result."""
    m, n, k = shape
    rows, columns, depth = {Phase.FORWARD: (m, n, k), Phase.INPUT: (m, k, n), Phase.WEIGHT: (n, k, m)}[phase]
    operands = {Phase.FORWARD: ((m, k), (n, k)), Phase.INPUT: ((m, n), (n, k)), Phase.WEIGHT: ((m, n), (m, k))}[phase]

    def make() -> Run:
        a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in operands)
        a, b = (a.t() if phase is Phase.WEIGHT else a), (b.t() if phase is Phase.FORWARD else b)
        return lambda: torch.mm(a, b)

    return Case(kernel=_matmul(1, rows, columns, depth, phase, dtype), make=make)


def _batched(batch: int, m: int, n: int, k: int, device: torch.device) -> Case:
    def make() -> Run:
        a = torch.ones(batch, m, k, device=device)
        b = torch.ones(batch, k, n, device=device)
        return lambda: torch.bmm(a, b)

    return Case(kernel=_matmul(batch, m, n, k, Phase.FORWARD, torch.float32), make=make, what="batched")


def _matmul(batch: int, m: int, n: int, k: int, phase: Phase, dtype: torch.dtype) -> Kernel:
    return Kernel(
        kind=KernelKind.MATMUL,
        phase=phase,
        dtype=_name(dtype),
        flops=2 * batch * m * n * k,
        nbytes=batch * (m * k + k * n + m * n) * dtype.itemsize,
        shape=(batch, m, n, k),
    )


# -- attention ----------------------------------------------------------------------------------------


def _attention(heads: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Forward, and backward, in which scores are computed again: two products, and five."""

    def qkv() -> Sequence[torch.Tensor]:
        return [torch.randn(1, heads, tokens, width, dtype=dtype, device=device).requires_grad_() for _ in range(3)]

    def forward() -> Run:
        with torch.no_grad():
            q, k, v = (x.detach() for x in qkv())
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def backward() -> Run:
        q, k, v = inputs = qkv()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seed = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, inputs, seed, retain_graph=True)

    one = int(2 * heads * tokens * tokens * width * _CAUSAL)  # a product
    for make, phase, products, tensors in ((forward, Phase.FORWARD, 2, 4), (backward, Phase.INPUT, 5, 8)):
        kernel = Kernel(
            kind=KernelKind.ATTENTION,
            phase=phase,
            dtype=_name(dtype),
            flops=products * one,
            nbytes=tensors * heads * tokens * width * dtype.itemsize,
            shape=(heads, tokens, tokens, width, width),
        )
        yield Case(kernel=kernel, make=make, what="causal")


# -- memory -------------------------------------------------------------------------------------------


def _stream(numel: int, device: torch.device) -> Case:
    def make() -> Run:
        a, b, out = (torch.ones(numel, device=device) for _ in range(3))
        return lambda: torch.add(a, b, out=out)

    kernel = Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=12 * numel)
    return Case(kernel=kernel, make=make, what="sum of two tensors")


def _update(numel: int, device: torch.device) -> Case:
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


def _between(numel: int, device: torch.device) -> Iterator[Case]:
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


# -- launching ----------------------------------------------------------------------------------------


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


def _launch(device: torch.device) -> Case:
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
