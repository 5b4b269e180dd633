"""Weights that functions multiply with are columns and rows like those of layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from parallel.tensor.blocks import Model
from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.products import Product, product_of

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))


class Einsum(nn.Module):
    """Attention with weights (width, heads, head_dim), biases of heads and a norm behind, as XLNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.empty(16, 4, 4)) for _ in range(4))
        self.bias = nn.Parameter(torch.empty(4, 4))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("bth,hnd->btnd", x, weight) for weight in (self.q, self.k, self.v))
        seen = torch.einsum("bind,bjnd->bnij", q + self.bias, k).softmax(-1)
        y = torch.einsum("bnij,bjnd->bind", seen, v)
        return self.norm(x + torch.einsum("bind,hnd->bih", y, self.o))


class Bare(nn.Module):
    """A two-layer perceptron of parameters; the bias of the row is added by the function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner = nn.Parameter(torch.empty(32, 16)), nn.Parameter(torch.empty(32))
        self.down, self.outer = nn.Parameter(torch.empty(16, 32)), nn.Parameter(torch.empty(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(F.linear(x, weight=self.up, bias=self.inner))
        return x + F.linear(y, self.down, self.outer)


class Multiplied(nn.Module):
    """The same with `@`, of which one is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(16, 32))
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(x @ self.up))


@pytest.mark.parametrize("tp", [2, 4])
def test_attention_of_einsums_is_divided_by_heads(tp: int) -> None:
    plan = plan_tensor(Model(Einsum()), (X,), tp=tp)
    found = plan.units["blocks.0"]

    assert found.products == {"q": "column", "k": "column", "v": "column", "o": "row"}
    assert {name: found.slices[name] for name in "qkvo"} == dict.fromkeys("qkvo", Slice.even(1, 4, tp))
    assert found.slices["bias"] == Slice.even(0, 4, tp)
    assert plan.sharded_share == 1.0


def test_parameters_of_functions_are_divided_with_their_biases() -> None:
    plan = plan_tensor(Model(Bare()), (X,), tp=2)
    found = plan.units["blocks.0"]

    assert found.products == {"up": "column", "down": "row"}
    assert (found.slices["inner"], "outer" in found.slices) == (Slice.even(0, 32, 2), False)
    assert plan.sharded_share == 1.0


def test_functions_and_layers_are_divided_together() -> None:
    plan = plan_tensor(Model(Multiplied()), (X,), tp=2)
    found = plan.units["blocks.0"]

    assert (found.products, found.reduces) == ({"up": "column"}, ("down",))
    assert plan.sharded_share == 1.0


@pytest.mark.parametrize(
    ("equation", "place", "product"),
    [
        ("ibh,hnd->ibnd", 2, Product(out_dim=1, in_dim=0, x_dim=2, y_dim=2)),
        ("ibnd,hnd->ibh", 2, Product(out_dim=0, in_dim=1, x_dim=2, y_dim=2)),
        ("hd, bd -> bh", 1, Product(out_dim=0, in_dim=1, x_dim=1, y_dim=1)),
        ("bnh,nho->bno", 2, None),  # a weight of its own for each n
        ("bh,hh->bh", 2, None),  # a diagonal
        ("b...h,ho->b...o", 2, None),
    ],
)
def test_features_are_told_from_the_equation(equation: str, place: int, product: Product | None) -> None:
    weight = torch.empty(2, 2)
    args = [equation, torch.empty(2, 2), torch.empty(2, 2)]
    args[place] = weight
    found = product_of(torch.einsum, args, {}, lambda given: given is weight)

    assert (None if found is None else found.product) == product
