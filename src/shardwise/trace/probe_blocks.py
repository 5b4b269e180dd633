"""Whole blocks by the clock, forward and backward, beside the kernels that a trace says they are made of.

A kernel that is repeated finds its operands in the cache, and nobody between it and the next; in a model neither is so.
What a block takes longer than its kernels alone is what a program adds to each, and what memory costs in between.

    plain   layer norms, one product for queries, keys and values, a perceptron with GELU        (GPT-2, BERT, ViT)
    gated   norms by root mean square in plain code, rotary places, grouped keys, a gated perceptron  (Llama, Mixtral)
    head    a norm, the scores of a vocabulary, cross entropy

From tiny to as large as is timed in a moment. Knows one device; refuses to know ranks and what is fitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.kernels import Kernel, Phase
from shardwise.trace.profile import trace

__all__ = ["BlockShape", "block", "block_kernels", "block_seconds", "block_shapes"]


class BlockShape(NamedTuple):
    """What is computed, on how many tokens of a sample, how wide; heads of attention, or words of a vocabulary."""

    kind: str
    tokens: int
    width: int
    parts: int

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens} x {self.width}"


_SHAPES = (
    BlockShape("plain", 32, 64, 4),
    BlockShape("plain", 128, 128, 4),
    BlockShape("plain", 128, 256, 4),
    BlockShape("plain", 256, 384, 6),
    BlockShape("gated", 64, 128, 4),
    BlockShape("gated", 512, 128, 4),
    BlockShape("gated", 128, 320, 4),
    BlockShape("gated", 256, 384, 6),
    BlockShape("head", 128, 192, 3072),
    BlockShape("head", 256, 320, 6144),
)


class _Plain(nn.Module):
    """As most transformers had it, before the norms became others'."""

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


class _Norm(nn.Module):
    """By root mean square (Zhang and Sennrich 2019), operation by operation, as models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return y


class _Gated(nn.Module):
    """As transformers have it since Llama (Touvron et al. 2023): half as many keys as queries."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.norms = nn.ModuleList(_Norm(width) for _ in range(2))
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        inner = width * 8 // 3 // 64 * 64
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        y = self.norms[0](x)
        q, k, v = (
            layer(y).view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # (batch, heads, tokens, head_dim)
            for layer in (self.q, self.k, self.v)
        )
        angles = torch.arange(tokens, device=x.device)[:, None] / torch.arange(1, self.head_dim + 1, device=x.device)
        q, k = (_turned(each, angles.cos(), angles.sin()) for each in (q, k))
        k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        y = self.norms[1](x)
        z: torch.Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return z


def _turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary places (Su et al. 2021), as transformers computes them."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class _Head(nn.Module):
    """The loss of every token's next one, as a row of the width of the input, so that it has a gradient as others."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.scores(self.norm(x)).flatten(0, 1)  # (tokens, words)
        wanted = torch.arange(len(rows), device=x.device) % rows.shape[1]
        return F.cross_entropy(rows, wanted).expand_as(x)


_KINDS: Mapping[str, Callable[[int, int], nn.Module]] = MappingProxyType(
    {"plain": _Plain, "gated": _Gated, "head": _Head}
)


def block(shape: BlockShape) -> nn.Module:
    """Of that kind: takes and gives (batch, tokens, width)."""
    return _KINDS[shape.kind](shape.width, shape.parts)


class _Model(nn.Module):
    """A block, what gives it an input with a gradient, and a loss."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.first = nn.Linear(shape.width, shape.width)
        self.block = block(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.block(self.first(x)).sum()
        return loss


def block_shapes(*, quick: bool = False) -> Sequence[BlockShape]:
    """What is measured, the same on every rank."""
    return (_SHAPES[0], _SHAPES[2], _SHAPES[6], _SHAPES[8]) if quick else _SHAPES


def block_kernels(shape: BlockShape) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Of a forward and of a backward, in float32."""
    profile = trace(_Model(shape), {"x": torch.zeros(1, shape.tokens, shape.width)}, units=["first", "block"])
    (call,) = (call for call in profile.calls if call.unit == "block")
    forward = tuple(kernel for kernel in call.kernels if kernel.phase is Phase.FORWARD)
    return forward, tuple(kernel for kernel in call.kernels if kernel.phase is not Phase.FORWARD)


def block_seconds(
    shape: BlockShape, device: torch.device, *, window_s: float, begin: Callable[[], None] | None = None
) -> tuple[float, float]:
    """Of one forward and one backward: means over those that fit into `window_s`, two at least, after one that warms up
    and `begin`."""
    torch.manual_seed(0)
    made = block(shape).to(device)
    x = torch.randn(1, shape.tokens, shape.width, device=device, requires_grad=True)  # (batch, tokens, width)
    seed = torch.ones(1, shape.tokens, shape.width, device=device)
    _once(made, x, seed, device)
    if begin is not None:
        begin()
    runs, forward_s, backward_s = 0, 0.0, 0.0
    while runs < 2 or forward_s + backward_s < window_s:
        one = _once(made, x, seed, device)
        runs, forward_s, backward_s = runs + 1, forward_s + one[0], backward_s + one[1]
    return forward_s / runs, backward_s / runs


def _once(made: nn.Module, x: torch.Tensor, seed: torch.Tensor, device: torch.device) -> tuple[float, float]:
    made.zero_grad()
    x.grad = None
    start = _now(device)
    y = made(x)
    middle = _now(device)
    y.backward(seed)
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
