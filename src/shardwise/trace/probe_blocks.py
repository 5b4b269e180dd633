"""Whole blocks by the clock, forward and backward, beside the kernels that a trace says they are made of.

A kernel that is repeated finds its operands in the cache, and nobody between it and the next; in a model neither is so.
What a block takes longer than its kernels alone is what a program adds to each, and what memory costs in between.
Blocks are of one kind (attention, a perceptron, two norms), from tiny to as large as is timed in a moment. Knows one
device; refuses to know ranks and what is fitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.kernels import Kernel, Phase
from shardwise.trace.profile import trace

__all__ = ["BlockShape", "block_kernels", "block_seconds", "block_shapes"]

BlockShape = tuple[int, int, int]  # tokens, width, heads

_SHAPES: tuple[BlockShape, ...] = ((32, 64, 4), (64, 128, 4), (512, 128, 4), (128, 256, 4), (256, 384, 6))


class _Block(nn.Module):
    """As most transformers have it, before the norms became others'."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, head_dim) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y


class _Model(nn.Module):
    """A block, what gives it an input with a gradient, and a loss."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.block = _Block(width, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.block(self.first(x)).sum()
        return loss


def block_shapes(*, quick: bool = False) -> Sequence[BlockShape]:
    """What is measured, the same on every rank."""
    return _SHAPES[:4:3] if quick else _SHAPES


def block_kernels(shape: BlockShape) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Of a forward and of a backward, in float32."""
    tokens, width, heads = shape
    profile = trace(_Model(width, heads), {"x": torch.zeros(1, tokens, width)}, units=["first", "block"])
    (call,) = (call for call in profile.calls if call.unit == "block")
    forward = tuple(kernel for kernel in call.kernels if kernel.phase is Phase.FORWARD)
    return forward, tuple(kernel for kernel in call.kernels if kernel.phase is not Phase.FORWARD)


def block_seconds(
    shape: BlockShape, device: torch.device, *, window_s: float, begin: Callable[[], None] | None = None
) -> tuple[float, float]:
    """Of one forward and one backward: means over those that fit into `window_s`, two at least, after one that warms up
    and `begin`."""
    tokens, width, heads = shape
    torch.manual_seed(0)
    block = _Block(width, heads).to(device)
    x = torch.randn(1, tokens, width, device=device, requires_grad=True)
    seed = torch.ones(1, tokens, width, device=device)
    _once(block, x, seed, device)
    if begin is not None:
        begin()
    runs, forward_s, backward_s = 0, 0.0, 0.0
    while runs < 2 or forward_s + backward_s < window_s:
        one = _once(block, x, seed, device)
        runs, forward_s, backward_s = runs + 1, forward_s + one[0], backward_s + one[1]
    return forward_s / runs, backward_s / runs


def _once(block: nn.Module, x: torch.Tensor, seed: torch.Tensor, device: torch.device) -> tuple[float, float]:
    block.zero_grad()
    x.grad = None
    start = _now(device)
    y = block(x)
    middle = _now(device)
    y.backward(seed)
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
