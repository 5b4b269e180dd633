"""The forwards of layers that are one product with a weight, written so that somebody else may compute the product.

Linear layers and convolutions of torch, embeddings, the transposed linear layer of GPT-2, and shardwise's own divided
layers. A subclass has a forward of its own, so that only the classes themselves are known. Knows modules and what
they compute around the product; refuses to know who takes it over, and when.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.execute.layer_products import Convolution, LayerProducts, Linear, Lookup, Transposed
from shardwise.parallel.tensor.layers import is_transposed
from shardwise.parallel.tensor.modules import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

__all__ = ["OwnProducts", "TakeOver", "forward_of"]

Forward = Callable[..., Any]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class TakeOver(Protocol):
    """The product of a layer with its weight, plus `bias`; None where the layer is to compute it as ever."""

    def __call__(self, of: LayerProducts, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None: ...


class OwnProducts(nn.Module):
    """A layer with a `weight` that says itself what its products are; its forward calls `self.product(x, bias)`."""

    def layer_products(self) -> LayerProducts:
        """What the layer computes; asked once."""
        raise NotImplementedError

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The output, by autograd alone where nobody takes the weight gradient over."""
        raise NotImplementedError


def forward_of(module: Any, product: TakeOver) -> Mapping[str, Forward] | None:
    """Methods to put in place of the module's own, by name; None for a module that is not known here."""
    kind = type(module)
    if kind is nn.Linear:
        return {"forward": _plain(module, Linear(), product)}
    if is_transposed(module):
        own = _plain(module, Transposed(), product)
        return {"forward": own, "product": _given_bias(Transposed(), product, lambda x: x @ module.weight)}
    if kind is nn.Embedding:
        if module.sparse or module.scale_grad_by_freq or module.max_norm is not None:
            return None
        return {"forward": _lookup(module, product)}
    if kind in _CONVOLUTIONS:
        return {"forward": _convolution(module, product)}
    if kind in _TRANSPOSED:
        return {"forward": _transposed_convolution(module, product)}
    if kind in (ColumnParallelLinear, RowParallelLinear):
        return {"product": _given_bias(Linear(), product, module.product)}
    if kind is VocabParallelEmbedding:
        return {"product": _given_bias(Lookup(_padding(module.local_padding)), product, module.product)}
    if isinstance(module, OwnProducts):
        return {"product": _given_bias(module.layer_products(), product, module.product)}
    return None


def _padding(index: int | None) -> int:
    return -1 if index is None else index


def _plain(module: nn.Module, of: LayerProducts, product: TakeOver) -> Forward:
    body, table = module.forward, module._parameters

    @functools.wraps(body)  # who divides units looks for arguments by their names
    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            y = product(of, args[0], table.get("bias"))
            if y is not None:
                return y
        return body(*args, **kwargs)

    return forward


def _given_bias(of: LayerProducts, product: TakeOver, body: Forward) -> Forward:
    def of_layer(x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        y = product(of, x, bias)
        return y if y is not None else body(x) if bias is None else body(x, bias)

    return of_layer


def _lookup(module: Any, product: TakeOver) -> Forward:
    body = module.forward

    def forward(input: torch.Tensor) -> Any:
        y = product(Lookup(_padding(module.padding_idx)), input, None)
        return body(input) if y is None else y

    return forward


def _convolution(module: Any, product: TakeOver) -> Forward:
    body, table, dims = module.forward, module._parameters, len(module.kernel_size)
    around = None if module.padding_mode == "zeros" else tuple(module._reversed_padding_repeated_twice)
    padding = (0,) * dims if around else _numbers(module.padding, module.kernel_size, module.dilation)

    def forward(input: torch.Tensor) -> Any:
        if padding is None or input.dim() != dims + 2:
            return body(input)
        x = input if around is None else F.pad(input, around, mode=module.padding_mode)
        of = Convolution(module.stride, padding, module.dilation, module.groups)  # groups may have been divided
        y = product(of, x, table.get("bias"))
        return body(input) if y is None else y

    return forward


def _numbers(
    padding: str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Padding on both sides; None where the sides differ."""
    if not isinstance(padding, str):
        return padding
    if padding == "valid":
        return (0,) * len(kernel)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return None if any(each % 2 for each in total) else tuple(each // 2 for each in total)


def _transposed_convolution(module: Any, product: TakeOver) -> Forward:
    body, table, dims = module.forward, module._parameters, len(module.kernel_size)

    def forward(input: torch.Tensor, output_size: list[int] | None = None) -> Any:
        if input.dim() != dims + 2 or module.padding_mode != "zeros":
            return body(input, output_size)
        extra = module._output_padding(
            input, output_size, module.stride, module.padding, module.kernel_size, dims, module.dilation
        )
        of = Convolution(module.stride, module.padding, module.dilation, module.groups, True, tuple(extra))
        y = product(of, input, table.get("bias"))
        return body(input, output_size) if y is None else y

    return forward
