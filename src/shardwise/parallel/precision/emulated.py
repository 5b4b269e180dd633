"""16-bit products on devices that have none: operands and results rounded, multiplied in float32.

    x (float32) ─round─┐
                       ├─ product in float32 ─ round ─► y (float32, of 16-bit values; float16 beyond 65504 is inf)
    w (float32) ─round─┘

What a tensor core does (operands of 16 bits, sums in float32), at the price of the roundings: on CPUs native 16-bit
arithmetic is 10 to 100 times slower. A dispatch mode sees every product there is below autograd, forward and backward,
whoever asks for it: layers, plain code, products that add to a gradient (of these the product is rounded, the sum is
float32's). All other operations stay in float32. Knows operators of torch; refuses
to know modules and layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Emulated", "rounded"]

_aten = torch.ops.aten

# operator -> places of its operands
_PRODUCTS: Mapping[Any, tuple[int, ...]] = MappingProxyType(
    {
        _aten.mm.default: (0, 1),
        _aten.bmm.default: (0, 1),
        _aten.mv.default: (0, 1),
        _aten.dot.default: (0, 1),
        _aten.addmm.default: (0, 1, 2),
        _aten.addmv.default: (0, 1, 2),
        _aten.baddbmm.default: (0, 1, 2),
        _aten.addbmm.default: (0, 1, 2),
        _aten.linear.default: (0, 1, 2),
        _aten._trilinear.default: (0, 1, 2),
        _aten._grouped_mm.default: (0, 1, 3),
        _aten.convolution.default: (0, 1, 2),
        _aten.convolution_backward.default: (0, 1, 2),
        _aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 1, 2),
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (0, 1, 2, 3, 4),
        torch.ops.mkldnn._linear_pointwise.default: (0, 1, 2),
        torch.ops.mkldnn._convolution_pointwise.default: (0, 1, 2),
    }
)
_ADDING: Mapping[Any, Any] = MappingProxyType({_aten.addmm_.default: torch.mm, _aten.baddbmm_.default: torch.bmm})
_FIRST_ONLY = frozenset({_aten._scaled_dot_product_flash_attention_for_cpu.default})  # the log-sum-exp is float32


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of `tensor` rounded to `dtype`, in the tensor's own dtype."""
    return tensor.to(dtype).to(tensor.dtype)


class Emulated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, products of float32 tensors are those of `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        places = _PRODUCTS.get(func)
        if places is None:
            added = _ADDING.get(func)
            if added is None or type(args[0]) not in _PLAIN or args[0].dtype != torch.float32:
                return func(*args, **(kwargs or {}))
            factors = {"beta": 1, "alpha": 1, **(kwargs or {})}
            made = self._narrow(added(self._narrow(args[1]), self._narrow(args[2])))
            into = args[0] if factors["beta"] == 1 else args[0].mul_(factors["beta"])
            return into.add_(made, alpha=factors["alpha"])
        own = self._narrow
        given = [own(arg) if place in places else arg for place, arg in enumerate(args)]
        out = func(*given, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            return own(out)
        return tuple(own(each) if place == 0 or func not in _FIRST_ONLY else each for place, each in enumerate(out))

    def _narrow(self, leaf: Any) -> Any:
        if type(leaf) not in _PLAIN or leaf.dtype != torch.float32:
            return leaf
        return leaf.to(self.dtype).to(torch.float32)


_PLAIN: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)
