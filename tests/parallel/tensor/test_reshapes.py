"""Sizes that a forward takes from whole tensors, and modules that hold both of their products."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from parallel.tensor.blocks import Model
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.reshapes import Reshaping, misfit


def test_a_reshape_that_asks_for_too_much_is_divided_where_the_plan_says() -> None:
    half = torch.arange(8.0).view(2, 4)

    assert misfit(torch.Tensor.view, (half, 2, 8)) == ((2, 8), 2)
    assert misfit(torch.Tensor.view, (half, 2, -1)) is None
    with Reshaping((1,)):
        assert half.reshape(2, 8).shape == (2, 4)
        assert half.reshape(4, 2).shape == (4, 2)
        with pytest.raises(RuntimeError, match="invalid for input of size 8"):
            half.reshape(2, 8)  # the plan knows of one


class Whole(nn.Module):
    """Attention that takes all its sizes from its input."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num, tokens, width = x.shape
        qkv = self.qkv(x).reshape(num, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return x + self.o(y.transpose(1, 2).reshape(num, tokens, width))


def test_attention_that_takes_its_sizes_from_its_input_is_divided() -> None:
    plan = plan_tensor(Model(Whole()), (torch.randn(2, 3, 16),), tp=2)

    assert plan.sharded_share == 1.0, plan.reasons
    assert list(plan.units["blocks.0"].reshapes) == [""]


class Experts(nn.Module):
    """Two experts in stacked tensors, gate and up interleaved, with biases; every token goes to both."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(2, 8, 12))
        self.up_bias = nn.Parameter(torch.empty(2, 12))
        self.down = nn.Parameter(torch.empty(2, 6, 8))
        self.down_bias = nn.Parameter(torch.empty(2, 8))

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in range(2):
            both = x @ self.up[expert] + self.up_bias[expert]
            y = (F.silu(both[..., ::2]) * both[..., 1::2]) @ self.down[expert] + self.down_bias[expert]
            out = out + weights[..., expert, None] * y
        return out


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.experts(x, self.router(x).softmax(-1))


def test_experts_that_hold_their_matrices_are_divided_inside() -> None:
    found = plan_tensor(Model(Routed()), (torch.randn(4, 8),), tp=2).units["blocks.0"]

    assert (found.copies, found.reduces) == (("experts", "router"), ("experts",))
    assert set(found.alone) == {"router"}  # a fifth of this block: its columns are joined behind it
    assert set(found.slices) == {"experts.up", "experts.up_bias", "experts.down", "router.weight", "router.bias"}
    assert found.once == found.partial == {"experts.down_bias"}
