"""Products and attentions to be timed.

    product     x (m, k) with w (n, k): forward x·wᵀ (m, n); gradients dy·w (m, k) and dyᵀ·x (n, k)
    attention   fused, causal, forward and backward

Knows torch and shapes; refuses to know the clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from shardwise.describe.kernels import Kernel, KernelKind, Phase
from shardwise.trace.probe_case import Case, Run, dtype_name

__all__ = ["attention", "batched", "product"]

_CAUSAL = 0.5  # of the scores
_OTHERS_BYTES = 24 << 20  # of weights that are multiplied with between two turns of one
_MOST_COPIES = 64


def product(shape: tuple[int, int, int], phase: Phase, dtype: torch.dtype, device: torch.device) -> Case:
    """One of the three products of a linear, at (rows, columns, depth) of its result."""
    m, n, k = shape
    rows, columns, depth = {Phase.FORWARD: (m, n, k), Phase.INPUT: (m, k, n), Phase.WEIGHT: (n, k, m)}[phase]
    operands = {Phase.FORWARD: ((m, k), (n, k)), Phase.INPUT: ((m, n), (n, k)), Phase.WEIGHT: ((m, n), (m, k))}[phase]

    def make() -> Run:
        a = torch.ones(operands[0], dtype=dtype, device=device)
        if phase is Phase.WEIGHT:
            b = torch.ones(operands[1], dtype=dtype, device=device)
            return lambda: torch.mm(a.t(), b)
        weight = torch.ones(operands[1], dtype=dtype, device=device)
        weights = [weight, *(weight.clone() for _ in range(_copies(weight)))]
        others = itertools.cycle([each.t() if phase is Phase.FORWARD else each for each in weights])
        return lambda: torch.mm(a, next(others))

    return Case(kernel=_matmul(1, rows, columns, depth, phase, dtype), make=make)


def _copies(weight: torch.Tensor) -> int:
    """So many that none is still in a core's own caches when its turn comes: a step has other weights between."""
    return min(_MOST_COPIES, _OTHERS_BYTES // weight.nbytes) if weight.device.type == "cpu" else 0


def batched(batch: int, m: int, n: int, k: int, device: torch.device) -> Case:
    """(batch, m, k) with (batch, k, n)."""

    def make() -> Run:
        a = torch.ones(batch, m, k, device=device)
        b = torch.ones(batch, k, n, device=device)
        return lambda: torch.bmm(a, b)

    return Case(kernel=_matmul(batch, m, n, k, Phase.FORWARD, torch.float32), make=make, what="batched")


def _matmul(batch: int, m: int, n: int, k: int, phase: Phase, dtype: torch.dtype) -> Kernel:
    return Kernel(
        kind=KernelKind.MATMUL,
        phase=phase,
        dtype=dtype_name(dtype),
        flops=2 * batch * m * n * k,
        nbytes=batch * (m * k + k * n + m * n) * dtype.itemsize,
        shape=(batch, m, n, k),
    )


def attention(heads: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
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
            dtype=dtype_name(dtype),
            flops=products * one,
            nbytes=tensors * heads * tokens * width * dtype.itemsize,
            shape=(heads, tokens, tokens, width, width),
        )
        yield Case(kernel=kernel, make=make, what="causal")
