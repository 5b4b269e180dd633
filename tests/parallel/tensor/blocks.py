"""Small blocks written by hand, with the plan that a person would write, for tests of tensor parallelism."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.instance import Call


class Attention(nn.Module):
    """Grouped-query attention with norms on queries and keys, and a number of heads in an attribute."""

    def __init__(self, width: int, heads: int, kv_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.dropout = dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, kv_heads * self.head_dim)
        self.v = nn.Linear(width, kv_heads * self.head_dim)
        self.norm = nn.LayerNorm(self.head_dim)
        self.o = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num, tokens, _ = x.shape
        q = self.norm(self.q(x).view(num, tokens, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.norm(self.k(x).view(num, tokens, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x).view(num, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, enable_gqa=True)  # (num, heads, tokens, head_dim)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated MLP around a residual stream."""

    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int = 2, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = Attention(width, heads, kv_heads, dropout=dropout)
        self.between = nn.LayerNorm(width)
        self.gate_up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before(x))
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """A stack of blocks with a loss."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def hand_plan(tp: int = 2, *, width: int = 16, kv_width: int = 8) -> UnitPlan:
    """The plan of `Block()`."""
    columns = {"attention.q": (width,), "attention.k": (kv_width,), "attention.v": (kv_width,)}
    slices = {"attention.o.weight": Slice.even(1, width, tp), "down.weight": Slice.even(1, 2 * width, tp)}
    for name, parts in {**columns, "gate_up": (2 * width, 2 * width)}.items():
        for leaf in ("weight", "bias"):
            slices[f"{name}.{leaf}"] = Slice.even(0, sum(parts), tp, parts)
    return UnitPlan(
        copies=("attention.q", "attention.k", "attention.v", "gate_up"),
        reduces=("attention.o", "down"),
        slices=slices,
        partial=frozenset({"attention.norm.weight", "attention.norm.bias"}),
        attributes={("attention", "num_heads"): (4 // tp,) * tp, ("attention", "num_kv_heads"): (2 // tp,) * tp},
    )


def call_of(*shape: int) -> Call:
    """A call with one random activation that wants its gradient."""
    generator = torch.Generator().manual_seed(0)
    return Call(args=(torch.randn(shape, generator=generator),), kwargs={}, requires_grad=frozenset({0}))
