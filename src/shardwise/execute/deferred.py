"""Weight gradients that are put off: what their products need is kept until the stage's W asks for them.

    I   ──► dx …            the gradients of inputs; every layer puts (x, dy) of its weight into the queue
    W   queue ──► dW += …   last layer first, as they came: x and dy are freed one layer after another

Splits a backward as zero-bubble schedules want it (Qi et al. 2023, arXiv:2401.10241, section 2), layer by layer where
torch splits the graph of autograd: all else that the forward kept is free at the end of I. Knows tensors and their
products; no stages, no order of actions.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwise.errors import DataflowError
from shardwise.execute.layer_products import LayerProducts
from shardwise.parallel.precision.masters import gradient_dtype

__all__ = ["Deferred", "Part", "add_gradient", "is_summed"]

Part = tuple[torch.Size, tuple[int, ...], int]  # a view of a parameter: size, strides, offset from its first element


@dataclasses.dataclass(slots=True)
class _Product:
    """The weight gradient of one call of a layer, to come."""

    of: LayerProducts
    x: torch.Tensor
    dy: torch.Tensor
    weight: nn.Parameter
    part: Part | None
    bias: nn.Parameter | None
    versions: tuple[int, int]


class Deferred:
    """The weight gradients of one stage and micro-batch, in the order in which the backward met them."""

    def __init__(self) -> None:
        self._waiting: collections.deque[_Product] = collections.deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for W; tensors that several layers read count once."""
        kept = [tensor for product in self._waiting for tensor in (product.x, product.dy)]
        return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}.values())

    @property
    def parameters(self) -> set[int]:
        """The ids of the parameters that are still to get a gradient from here."""
        own = (parameter for product in self._waiting for parameter in (product.weight, product.bias))
        return {id(parameter) for parameter in own if parameter is not None}

    def add(
        self,
        of: LayerProducts,
        x: torch.Tensor,
        dy: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        part: Part | None = None,
    ) -> None:
        """Keep what the gradients of `weight`, or of a `part` of it, and `bias` are made of."""
        self._waiting.append(_Product(of, x, dy, weight, part, bias, (x._version, dy._version)))

    def run(self, done: Callable[[nn.Parameter], None] | None = None) -> None:
        """Add all of them to the parameters' `.grad`, and free each layer's tensors behind its product.

        `done` is told of every parameter when nothing of it is left in the queue. Raises `DataflowError` where
        somebody has written into a tensor that was kept.
        """
        left: dict[int, int] = {}
        if done is not None:
            for product in self._waiting:
                for parameter in (product.weight, product.bias):
                    left[id(parameter)] = left.get(id(parameter), 0) + 1
        with torch.no_grad():
            while self._waiting:
                product = self._waiting.popleft()
                _check(product)
                add_gradient(product.of, product.x, product.dy, product.weight, product.part)
                if product.bias is not None:
                    _add(product.bias, product.of.bias_gradient(product.dy).to(gradient_dtype(product.bias)))
                if done is None:
                    continue
                for parameter in (product.weight, product.bias):
                    if parameter is not None:
                        left[id(parameter)] -= 1
                        if not left[id(parameter)]:
                            done(parameter)


def add_gradient(
    of: LayerProducts, x: torch.Tensor, dy: torch.Tensor, weight: nn.Parameter, part: Part | None = None
) -> None:
    """Add a weight gradient to `.grad`, or to a part of it; in place where there is one to add to.

    x and dy may be of a narrower type than the weight, as under autocast.
    """
    dtype = gradient_dtype(weight)
    if part is not None and weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=dtype, requires_grad=False)
    own = weight if part is None else _part_of(weight, part)
    if dy.dtype == weight.dtype and is_summed(weight):
        assert weight.grad is not None
        of.add_weight_gradient(weight.grad if part is None else _part_of(weight.grad, part), dy, x, own)
        return
    like = own if dy.dtype == weight.dtype else torch.empty_like(own, dtype=dy.dtype)  # of its shape, with any values
    dw = of.weight_gradient(dy, x, like).to(dtype)
    if part is not None:
        whole = torch.zeros_like(weight, dtype=dtype, requires_grad=False)
        _part_of(whole, part).copy_(dw)
        dw = whole
    _add(weight, dw)


def _part_of(whole: torch.Tensor, part: Part) -> torch.Tensor:
    size, strides, offset = part
    return whole.as_strided(size, strides, whole.storage_offset() + offset)


def is_summed(weight: torch.Tensor) -> bool:
    """Whether the weight has a gradient that a product may add to."""
    gradient = weight.grad
    return (
        gradient is not None
        and type(gradient) in (torch.Tensor, FakeTensor)
        and gradient.layout is torch.strided
        and gradient.is_contiguous()
        and gradient.dtype == weight.dtype
    )


def _add(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    elif parameter.grad.layout is torch.strided:
        parameter.grad.add_(gradient)
    else:
        parameter.grad = parameter.grad + gradient


def _check(product: _Product) -> None:
    if (product.x._version, product.dy._version) != product.versions:
        raise DataflowError(
            f"what a weight gradient is made of stays as it was between I and W, but the input or the output's "
            f"gradient of a layer with weight {tuple(product.weight.shape)} was written into; use a schedule without "
            "split backward"
        )
