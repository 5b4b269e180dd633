"""The three products of a layer, each by itself: its output, the gradient of its input, the gradient of its weight.

            output          input gradient        weight gradient                       bias gradient
  linear    y = x Wᵀ + b    dx = dy W             dW = dyᵀ x                            db = Σ dy over rows
  lookup    y = W[x]        (none)                dW[x] += dy

Autograd computes the last three at once; a split backward, and a sum in place, need them apart. Without a graph,
except where a backward of the backward is asked for. Knows tensors; no modules, no order.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from shardwise.execute import products

__all__ = ["Batched", "Convolution", "Grouped", "LayerProducts", "Linear", "Lookup", "Transposed"]


class LayerProducts(Protocol):
    """What a kind of layer computes. x is its input, dy the gradient of its output y."""

    @property
    def casts(self) -> bool:
        """Whether torch casts its operands under autocast."""
        ...

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def add_weight_gradient(self, into: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """into += the weight gradient; `into` is dense, and shaped as the weight."""
        ...

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """y = x Wᵀ + b; x (..., in), W (out, in), b (out). `divided`: the large products are oneDNN's, see `products`."""

    divided: bool = False

    @property
    def casts(self) -> bool:
        return True

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return products.linear(x, weight, bias) if self.divided else F.linear(x, weight, bias)

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.divided and not torch.is_grad_enabled():  # a double backward is autograd's own
            return products.times(dy, weight)
        return dy @ weight

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.mm(_rows(dy).t(), _rows(x), out=out)

    def add_weight_gradient(self, into: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        into.addmm_(_rows(dy).t(), _rows(x))

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        return _rows(dy).sum(0)


@dataclasses.dataclass(frozen=True, slots=True)
class Transposed:
    """y = x W + b; x (..., in), W (in, out), b (out): the linear layer of GPT-2."""

    @property
    def casts(self) -> bool:
        return True

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = _rows(x)
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        # no view of y, which autograd would not let anyone write into
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[1]))  # type: ignore[no-any-return]

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return dy @ weight.t()

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _rows(x).t() @ _rows(dy)

    def add_weight_gradient(self, into: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        into.addmm_(_rows(x).t(), _rows(dy))

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        return _rows(dy).sum(0)


@dataclasses.dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution over 1, 2 or 3 dims, transposed or not; x (batch, in, ...), b (out)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def _options(self) -> tuple[Any, ...]:
        extra = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, extra, self.groups

    @property
    def casts(self) -> bool:
        return True

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.convolution(x, weight, bias, *self._options)

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dx: torch.Tensor = self._backward(dy, x, weight, [True, False, False])[0]
        return dx

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dw: torch.Tensor = self._backward(dy, x, weight, [False, True, False])[1]
        return dw

    def add_weight_gradient(self, into: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        into.add_(self.weight_gradient(dy, x, weight))

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        return dy.sum([0, *range(2, dy.dim())])

    def _backward(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *self._options, wanted)


@dataclasses.dataclass(frozen=True, slots=True)
class Lookup:
    """y = W[x]: rows of a table W (n, d) at indices x of any shape; the row `padding` has no gradient (-1: none)."""

    padding: int = -1

    @property
    def casts(self) -> bool:
        return False

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.embedding(x, weight, None if self.padding < 0 else self.padding)

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise AssertionError("indices have no gradient")

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dw = torch.ops.aten.embedding_backward(dy, x, weight.shape[0], self.padding, False, False)
        return dw  # type: ignore[no-any-return]

    def add_weight_gradient(self, into: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        if into.device.type != "cpu":  # index_add is not deterministic there, autograd's own gradient is
            into.add_(self.weight_gradient(dy, x, weight))
            return
        if self.padding >= 0:
            dy = dy.masked_fill((x == self.padding).unsqueeze(-1), 0.0)
        into.index_add_(0, x.reshape(-1), _rows(dy))

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a table has no bias")


@dataclasses.dataclass(frozen=True, slots=True)
class Batched:
    """y[e] = x[e] W[e]; x (experts, rows, in), W (experts, in, out)."""

    @property
    def casts(self) -> bool:
        return True

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.bmm(x, weight)

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.bmm(dy, weight.transpose(1, 2))

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.transpose(1, 2), dy)

    def add_weight_gradient(self, into: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        into.baddbmm_(x.transpose(1, 2), dy)

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a product of stacks has no bias")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """y[r] = x[r] W[e] for rows r of group e, which ends at offs[e]; x (rows, in), W (experts, in, out).

    Rows behind the last group belong to none.
    """

    offs: torch.Tensor

    @property
    def casts(self) -> bool:
        return False

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.grouped_mm(x, weight, offs=self.offs)

    def input_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(dy, weight.transpose(1, 2), offs=self.offs)

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x.t(), dy, offs=self.offs)

    def add_weight_gradient(self, into: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """On a CPU, where groups are multiplied one by one anyway, each is summed by its product (BLAS: beta = 1): most
        weights are given transposed, and an addition would go through them across their memory."""
        if into.device.type != "cpu" or type(self.offs) is not torch.Tensor:
            into.add_(self.weight_gradient(dy, x, weight))
            return
        start = 0
        for group, stop in enumerate(self.offs.tolist()):
            if stop > start:
                into[group].addmm_(x[start:stop].t(), dy[start:stop])
            start = stop

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a product of groups has no bias")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., features) -> (rows, features)"""
    return tensor.reshape(-1, tensor.shape[-1])
