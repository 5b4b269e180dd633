"""Products by oneDNN are those of torch, and only large ones of float32 on CPUs are taken from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.execute import products
from shardwise.execute.weight_sums import WeightSums

WIDTH, ROWS = 640, (2, 3)  # WIDTH * WIDTH is above products.SMALLEST


class Heard(TorchDispatchMode):
    """The libraries that are asked for products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm") or func.namespace == "mkldnn":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rows", [(), (7,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_products_are_those_of_torch(rows: tuple[int, ...], transposed: bool) -> None:
    x, dy, weight, bias = made(*rows, WIDTH), made(*rows, 512), made(512, WIDTH), made(512)
    if transposed:
        x, dy = (value.transpose(0, -1).contiguous().transpose(0, -1) for value in (x, dy))
    with Heard() as heard:
        y, plain, dx = products.linear(x, weight, bias), products.linear(x, weight), products.times(dy, weight)
    assert heard.names == ["mkldnn::_linear_pointwise"] * 3
    exact = weight.double()
    for value, wanted in (
        (y, F.linear(x.double(), exact, bias.double())),
        (plain, F.linear(x.double(), exact)),
        (dx, dy.double() @ exact),
    ):
        assert value.shape == wanted.shape
        assert not value._is_view()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype, width", [(torch.float64, WIDTH), (torch.float32, 256), (torch.bfloat16, WIDTH)])
def test_other_products_are_torchs_own(dtype: torch.dtype, width: int) -> None:
    x, weight = made(*ROWS, width, dtype=dtype), made(width, width, dtype=dtype)
    with Heard() as heard:
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))
        assert torch.equal(products.times(x, weight), x @ weight)
    assert not [name for name in heard.names if name.startswith("mkldnn")]


def test_no_rows_are_no_rows() -> None:
    assert products.linear(made(0, WIDTH), made(512, WIDTH)).shape == (0, 512)


@pytest.mark.parametrize("bias", [True, False])
def test_a_divided_layer_has_its_gradients_in_every_step(bias: bool) -> None:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=bias))
    x = made(*ROWS, WIDTH).requires_grad_()
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    sums = WeightSums()
    sums.install(layer, ["0"], {"0.weight": layer[0].weight})
    sums.divide([layer[0].weight])
    with Heard() as heard:
        y = layer(x)
        y.add_(0.0)  # as a sum over ranks writes into it
        got = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert heard.names.count("mkldnn::_linear_pointwise") == 2
    for mine, each in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, each, rtol=1e-4, atol=1e-3)
    sums.close()
    with Heard() as heard:
        layer(x)
    assert "mkldnn::_linear_pointwise" not in heard.names


def test_a_layer_that_is_whole_multiplies_as_torch_does() -> None:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    sums = WeightSums()
    sums.install(layer, ["0"], {"0.weight": layer[0].weight})
    with sums.running(), Heard() as heard:
        layer(made(*ROWS, WIDTH)).sum().backward()
    assert heard.names
    assert "mkldnn::_linear_pointwise" not in heard.names
    sums.close()
