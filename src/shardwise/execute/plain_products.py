"""Products with a parameter that no layer makes: `F.linear(x, w)`, `x @ w`, `F.grouped_mm(x, w, offs)`, `F.embedding`.

The parameter itself, or a view of it (`w.t()`, one expert of a stack): the gradient of a view is added to the same
view of `.grad`. Inside this mode such a call is handed to whoever takes the weight gradient over. Knows functions and
what is a weight; refuses to know modules and actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shardwise.execute.layer_products import Batched, Grouped, LayerProducts, Linear, Lookup, Transposed
from shardwise.trace.multi_head import multi_head_attention

__all__ = ["PlainProducts", "TakeOverPart", "parameter_of"]

_MATMULS: tuple[Any, ...] = (torch.matmul, torch.mm, torch.bmm)
_METHODS: tuple[Any, ...] = (torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__)
_GROUPED: tuple[Any, ...] = (F.grouped_mm, torch._grouped_mm)


class TakeOverPart(Protocol):
    """The product with `weight`, a view of a parameter or that itself; None where it is to be computed as ever."""

    def __call__(
        self, of: LayerProducts, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None: ...


def parameter_of(weight: Any) -> nn.Parameter | None:
    """The parameter that `weight` is, or is a view of."""
    if isinstance(weight, nn.Parameter):
        return weight
    base = weight._base if isinstance(weight, torch.Tensor) else None
    if not isinstance(base, nn.Parameter) or not base.is_contiguous() or weight.dtype != base.dtype:
        return None
    written_twice = any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return None if written_twice or not weight.requires_grad else base


class PlainProducts(TorchFunctionMode):
    """Inside, `product` is asked for what is multiplied with a parameter."""

    def __init__(self, product: TakeOverPart) -> None:
        super().__init__()
        self._product = product

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # its products are calls of their own
                return multi_head_attention(*args, **kwargs)
        find = _FINDERS.get(func)
        found = None if find is None or not torch.is_grad_enabled() else find(args, kwargs)
        if found is not None and parameter_of(found[2]) is not None:
            y = self._product(*found)
            if y is not None:
                return y
        return func(*args, **kwargs)


_Found = tuple[LayerProducts, torch.Tensor, torch.Tensor, torch.Tensor | None]
_Finder = Callable[[tuple[Any, ...], Mapping[str, Any]], _Found | None]


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _linear(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Found | None:
    given = _named(args, kwargs, "input", "weight", "bias")
    x, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    return Linear(), x, weight, bias


def _matmul(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Found | None:
    if len(args) != 2 or kwargs or not all(isinstance(arg, torch.Tensor) for arg in args):
        return None
    x, weight = args
    if weight.dim() == 2 and x.dim() > 1:
        return Transposed(), x, weight, None
    if weight.dim() == 3 and x.dim() == 3 and x.shape[0] == weight.shape[0]:
        return Batched(), x, weight, None
    return None


def _addmm(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Found | None:
    if len(args) != 3 or kwargs or not all(isinstance(arg, torch.Tensor) for arg in args) or args[0].dim() != 1:
        return None
    return Transposed(), args[1], args[2], args[0]


def _grouped(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Found | None:
    given = _named(args, kwargs, "mat_a", "mat_b")
    a, b = (given.pop(name, given.pop(other, None)) for name, other in (("mat_a", "self"), ("mat_b", "mat2")))
    offs = given.pop("offs", None)
    plain = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and isinstance(offs, torch.Tensor)
    if not plain or a.dim() != 2 or b.dim() != 3 or any(value is not None for value in given.values()):
        return None
    return Grouped(offs), a, b, None


def _embedding(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Found | None:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = _named(args, kwargs, *names)
    x, weight, padding = given.get("input"), given.get("weight"), given.get("padding_idx")
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
        return None
    if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor):
        return None
    padding = -1 if padding is None else padding + weight.shape[0] if padding < 0 else padding
    return Lookup(padding), x, weight, None


_FINDERS: Mapping[Callable[..., Any], _Finder] = MappingProxyType(
    {
        F.linear: _linear,
        F.embedding: _embedding,
        torch.addmm: _addmm,
        **dict.fromkeys((*_MATMULS, *_METHODS), _matmul),
        **dict.fromkeys(_GROUPED, _grouped),
    }
)
