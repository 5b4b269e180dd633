"""Modules that are matrix products: which dims of their tensors are in and out, and how a partial product is computed.

Knows nn.Linear, convolutions without groups, the transposed linear layer of GPT-2 (transformers' Conv1D), and linear
layers of experts stacked in one weight.
Whatever else a unit holds is divided by what the gradients say of its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn as nn

__all__ = ["Layer", "bias_shape", "is_transposed", "layer_of", "product", "sized_fields"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Where in and out features stand: dims of the weight, and the dim of the activation that holds them."""

    out_dim: int
    in_dim: int
    features: int  # dim of input and output activations, counted from the end where negative
    bias_optional: bool = True  # whether the module runs without its bias

    def num_in(self, module: nn.Module) -> int:
        return int(_weight(module).shape[self.in_dim])

    def num_out(self, module: nn.Module) -> int:
        return int(_weight(module).shape[self.out_dim])


_LINEAR = Layer(out_dim=0, in_dim=1, features=-1)
_TRANSPOSED = Layer(out_dim=1, in_dim=0, features=-1, bias_optional=False)
_STACKED = Layer(out_dim=1, in_dim=2, features=-1)
_CONVOLUTIONS = ((nn.Conv1d, -2), (nn.Conv2d, -3), (nn.Conv3d, -4))

# Fields of torch's own modules that repeat a size of a tensor: (tensor, dim) -> field.
_FIELDS: Mapping[type, Mapping[tuple[str, int], str]] = MappingProxyType(
    {
        nn.Linear: {("weight", 0): "out_features", ("weight", 1): "in_features"},
        nn.Conv1d: {("weight", 0): "out_channels", ("weight", 1): "in_channels"},
        nn.Conv2d: {("weight", 0): "out_channels", ("weight", 1): "in_channels"},
        nn.Conv3d: {("weight", 0): "out_channels", ("weight", 1): "in_channels"},
        nn.Embedding: {("weight", 1): "embedding_dim"},  # code outside asks for the number of rows: it stays whole
        nn.BatchNorm1d: {("weight", 0): "num_features"},
        nn.BatchNorm2d: {("weight", 0): "num_features"},
    }
)
_TRANSPOSED_FIELDS: Mapping[tuple[str, int], str] = MappingProxyType({("weight", 1): "nf", ("weight", 0): "nx"})


def layer_of(module: nn.Module) -> Layer | None:
    """How `module` multiplies, or None where it is no plain matrix product."""
    if is_transposed(module):
        return _TRANSPOSED
    if isinstance(module, nn.Linear):
        return _LINEAR
    if _is_stacked(module):
        return _STACKED
    for kind, features in _CONVOLUTIONS:
        if isinstance(module, kind):
            return Layer(out_dim=0, in_dim=1, features=features) if module.groups == 1 else None
    return None


def sized_fields(module: nn.Module) -> Mapping[tuple[str, int], str]:
    """The module's fields that repeat sizes of its tensors."""
    if is_transposed(module):
        return _TRANSPOSED_FIELDS
    return next((fields for kind, fields in _FIELDS.items() if isinstance(module, kind)), {})


def product(module: nn.Module, body: Callable[..., Any], layer: Layer) -> Callable[..., torch.Tensor]:
    """The module's product without its bias. `body` is its own forward."""
    table = module._parameters

    def without_bias(*args: Any) -> torch.Tensor:
        bias = table["bias"]
        table["bias"] = None
        try:
            return body(*args)  # type: ignore[no-any-return]
        finally:
            table["bias"] = bias

    def transposed(x: torch.Tensor) -> torch.Tensor:
        own = vars(module).get("product")  # of who takes its weight gradient over
        return x @ _weight(module) if own is None else own(x)

    if not layer.bias_optional:
        return transposed
    return body if table.get("bias") is None else without_bias


def bias_shape(layer: Layer) -> tuple[int, ...]:
    """The shape in which a bias of out features broadcasts over the output."""
    return (-1, *([1] * (-layer.features - 1)))


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _is_stacked(module: nn.Module) -> bool:
    """One weight (experts, out, in) and nothing else, of a class that is not torch's: a linear layer an expert."""
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._modules
    return alone and weight is not None and weight.dim() == 3 and not type(module).__module__.startswith("torch.")


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight
