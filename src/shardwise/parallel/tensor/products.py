"""Products with a parameter that no layer makes: `F.linear(x, w)`, `x @ w`, `torch.einsum("ibh,hnd->ibnd", x, w)`.

In and out features are told from the call, so such a weight is a column or a row like a layer's. Several of them, as
the heads and their sizes in `hnd`, are divided along the first. Knows functions and which operand is a weight of the
unit; refuses to know what stands around the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shardwise.parallel.tensor.collectives import TensorGroup, copy_to, reduce_from
from shardwise.parallel.tensor.instance import Call, Doubled, twin
from shardwise.parallel.tensor.layers import layer_of

__all__ = ["DividedProducts", "Found", "Product", "product_of", "products_in"]

_SMALLEST = 1 / 64  # of the elements of a unit's parameters: routers are none


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """Where a weight's in and out features stand: dims of the weight, of the input x and of the output y."""

    out_dim: int
    in_dim: int
    x_dim: int
    y_dim: int
    bias: str = ""  # the parameter that is added


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A call that multiplies with a weight: whose, at which place x stands among the arguments, and the bias if any."""

    weight: torch.Tensor
    place: int
    product: Product
    bias: torch.Tensor | None = None


_LINEAR = Product(out_dim=0, in_dim=1, x_dim=-1, y_dim=-1)
_MATMUL = Product(out_dim=1, in_dim=0, x_dim=-1, y_dim=-1)
_MATMULS = frozenset({torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__})


def product_of(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]
) -> Found | None:
    """The product that a call is; None where it is none, or one of two weights or of none."""
    if func is F.linear and args:
        given: dict[str, Any] = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
        weight: Any = given.get("weight")
        if is_weight(weight) and not is_weight(args[0]) and weight.dim() == 2:
            return Found(weight=weight, place=0, product=_LINEAR, bias=given.get("bias"))
        return None
    if func in _MATMULS and len(args) > 1 and is_weight(args[1]) and not is_weight(args[0]) and args[1].dim() == 2:
        return Found(weight=args[1], place=0, product=_MATMUL)
    if func is torch.einsum and len(args) == 3 and isinstance(args[0], str):
        weights = [at for at in (1, 2) if is_weight(args[at])]
        if len(weights) == 1:
            product = _of_equation(args[0], weight=weights[0] - 1)
            place = 3 - weights[0]
            return None if product is None else Found(weight=args[weights[0]], place=place, product=product)
    return None


def _of_equation(equation: str, *, weight: int) -> Product | None:
    """Of `ibh,hnd->ibnd`: in features are summed over, out features are in the weight and the output alone."""
    inputs, arrow, y = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    letters = set(string.ascii_letters)
    if not arrow or len(operands) != 2 or not all(set(labels) <= letters for labels in (*operands, y)):
        return None
    w, x = operands[weight], operands[1 - weight]
    if any(len(set(labels)) != len(labels) for labels in (w, x, y)) or set(w) & set(x) & set(y):
        return None  # a diagonal, or a weight of its own for each of many: no plain product
    ins, outs = [label for label in w if label in x], [label for label in w if label in y]
    if not ins or not outs:
        return None
    return Product(out_dim=w.index(outs[0]), in_dim=w.index(ins[0]), x_dim=x.index(ins[0]), y_dim=y.index(outs[0]))


def products_in(unit: nn.Module, call: Call) -> tuple[dict[str, int], bool]:
    """The weights that functions multiply with in `call`, and no layer: name -> elements. Small ones are left out.

    And whether `F.multi_head_attention_forward` is called, whose products are its own.
    """
    copied = twin(unit)
    copied.train(False)
    watch = _Watch(copied)
    args, kwargs = call.fresh(seed=0)
    with contextlib.ExitStack() as stack, torch.no_grad(), Doubled(), watch:
        for module in copied.modules():
            if layer_of(module) is not None:
                stack.enter_context(watch.out_of(module))
        copied(*args, **kwargs)
    least = _SMALLEST * sum(parameter.numel() for parameter in unit.parameters())
    return {name: size for name, size in watch.seen.items() if size >= least}, watch.attends


class _Watch(TorchFunctionMode):
    """Notes products with parameters, outside of layers."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in unit.named_parameters()}
        self._inside = 0
        self.seen: dict[str, int] = {}
        self.attends = False

    @contextlib.contextmanager
    def out_of(self, layer: nn.Module) -> Iterator[None]:
        def enter(*_: Any) -> None:
            self._inside += 1

        def leave(*_: Any) -> None:
            self._inside -= 1

        handles = layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = None if self._inside else product_of(func, args, kwargs, lambda given: id(given) in self._names)
        self.attends = self.attends or func is F.multi_head_attention_forward
        if found is not None:
            self.seen[self._names[id(found.weight)]] = found.weight.numel()
        return func(*args, **kwargs)


class DividedProducts(TorchFunctionMode):
    """Inside, products with these weights (by id) are columns, rows or forks: "column", "row", "fork".

    A column's input is a copy whose gradient is summed over the ranks, a row's output is summed and its bias added
    once, a fork is whole and its gradient is summed. `copy` makes the copies.
    """

    def __init__(
        self, roles: Mapping[int, str], group: TensorGroup, copy: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self._roles = roles
        self._group = group
        self._copy = copy or (lambda x: copy_to(x, group))

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = product_of(func, args, kwargs, lambda given: id(given) in self._roles)
        if found is None:
            return func(*args, **kwargs)
        role = self._roles[id(found.weight)]
        if role == "column":
            return func(*[self._copy(arg) if at == found.place else arg for at, arg in enumerate(args)], **kwargs)
        if role == "fork":
            return copy_to(func(*args, **kwargs), self._group)
        without = {name: value for name, value in kwargs.items() if name != "bias"}
        total = reduce_from(func(*(args[:2] if func is F.linear else args), **without), self._group)
        return total if found.bias is None else total + found.bias
