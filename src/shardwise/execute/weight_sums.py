"""Weight gradients summed where they live, or put off: `grad += dy^T x` as one matrix product.

Autograd computes the weight gradient of every micro-batch into a tensor of its own and adds it to `.grad`: it writes
the weight's size once and reads and writes it twice more. Here the product accumulates (BLAS: beta = 1), as
Megatron-LM's gradient accumulation fusion does on GPUs (arXiv:2104.04473 describes the system); an embedding adds
the rows that it looked up. Where a backward is split, the same products wait in a queue (`deferred`).
Only inside units, for layers that torch, transformers and shardwise define (`layer_forwards`), and, where that leaves
much, for products in plain code (`plain_products`).
Whatever else asks for a gradient (hooks, double backward, `autograd.grad` in a forward) gets it as from plain torch.
Layers that are divided among ranks, whose sums have another order anyway, also multiply by `products`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwise.execute import products
from shardwise.execute.deferred import Deferred
from shardwise.execute.layer_forwards import forward_of
from shardwise.execute.layer_products import LayerProducts, Linear
from shardwise.execute.plain_products import PlainProducts, parameter_of
from shardwise.execute.split_product import Product, Target, cast_of

__all__ = ["SMALLEST", "WeightSums"]

SMALLEST = 2**17  # elements; below, a Python function costs more than the addition (measured: docs/log.md)
_INPUTS = (torch.Tensor, nn.Parameter)
_REHEARSED = (*_INPUTS, FakeTensor)  # in a step; outside of steps they belong to traces


@dataclasses.dataclass(slots=True, eq=False)
class _Layer:
    """A layer whose weight gradient may be taken over."""

    module: nn.Module
    units: set[str]
    large: bool
    splits: bool = True


class WeightSums:
    """The switch of all layers that sum in place or put off their weight gradients. Off, they are what they were.

    `running()` is around the forwards and backwards of a step, `adding()` around a backward whose weight gradients
    nobody waits for, `deferring()` around one that leaves them in a queue; outside of both, gradients take autograd's
    way, with its hooks.
    """

    def __init__(self) -> None:
        self.runs = False
        self.on = False
        self.splits = False
        self.adds = False
        self.deferred: Deferred | None = None
        self.home: Callable[[nn.Parameter], torch.Tensor | None] = _nowhere
        self._divided: set[int] = set()
        self._layers: dict[int, _Layer] = {}
        self._undo: list[tuple[nn.Module, str, Any]] = []
        self._watched: list[tuple[str, _Layer, Any]] = []

    def install(self, model: nn.Module, units: Sequence[str], held: Mapping[str, nn.Parameter]) -> None:
        """Give the layers inside `units` whose weight is one of `held` a product that can be summed in place."""
        own = {id(parameter) for parameter in held.values()}
        for unit in units:
            for module in model.get_submodule(unit).modules():
                weight = module._parameters.get("weight")
                if id(module) in self._layers:
                    self._layers[id(module)].units.add(unit)
                elif "forward" in vars(module):  # somebody has given it another: it may be no product
                    continue
                elif weight is not None and id(weight) in own and not _hooked(weight):
                    self._take(_Layer(module, {unit}, weight.numel() >= SMALLEST))

    def _take(self, layer: _Layer) -> None:
        module = layer.module

        def product(of: LayerProducts, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
            weight = module._parameters.get("weight")
            if not isinstance(weight, nn.Parameter) or not self._takes(layer, of, x, weight):
                return None
            if self._divided and id(weight) in self._divided:
                of = dataclasses.replace(of, divided=True) if isinstance(of, Linear) else of
            return self._product(layer, of, x, weight, bias, weight)

        found = forward_of(module, product)
        if found is None:
            return
        self._layers[id(module)] = layer
        for name, function in found.items():
            self._undo.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = function

    def watch(self, unit: str, module: nn.Module) -> None:
        """Products with parameters that no layer makes may be put off too, in this unit. It costs every operation of
        the unit a Python call in steps that split; to be taken back by `unwatch`, in reverse order."""
        layer = _Layer(module, {unit}, large=False)
        body, before = module.forward, module.__dict__.get("forward")
        hooked = {id(parameter) for parameter in module.parameters() if _hooked(parameter)}

        def product(
            of: LayerProducts, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor | None:
            parameter = parameter_of(weight)
            if parameter is None or id(parameter) in hooked or not self._takes(layer, of, x, parameter):
                return None
            return self._product(layer, of, x, weight, bias, parameter)

        mode = PlainProducts(product)

        @functools.wraps(body)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.splits or not layer.splits:
                return body(*args, **kwargs)
            with mode:
                return body(*args, **kwargs)

        module.__dict__["forward"] = forward
        self._watched.append((unit, layer, before))

    def unwatch(self, unit: str | None = None) -> None:
        """Take back what `watch` did, for one unit or for all."""
        for watched in reversed([each for each in self._watched if unit in (None, each[0])]):
            _, layer, before = watched
            if before is None:
                layer.module.__dict__.pop("forward", None)
            else:
                layer.module.__dict__["forward"] = before
            self._watched.remove(watched)

    def divide(self, weights: Iterable[nn.Parameter]) -> None:
        """Of linear layers with one of these weights the large ones use `products`, in every step."""
        self._divided.update(id(weight) for weight in weights if weight.numel() >= products.SMALLEST)

    def keep_whole(self, units: Collection[str]) -> None:
        """The backward of these units is not split."""
        for layer in (*self._layers.values(), *(layer for _, layer, _ in self._watched)):
            layer.splits = layer.splits and not layer.units & set(units)

    def close(self) -> None:
        """Give the layers their own forward back."""
        for module, name, before in reversed(self._undo):
            if before is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
        self._undo.clear()
        self._layers.clear()

    @contextlib.contextmanager
    def running(self, *, sums: bool = True, splits: bool = False) -> Iterator[None]:
        """Forwards in the block may sum in place in their backward (`sums`), or leave it to a queue (`splits`)."""
        self.runs, self.on, self.splits = True, sums, splits
        try:
            yield
        finally:
            self.runs = self.on = self.splits = False

    @contextlib.contextmanager
    def adding(self, adds: bool) -> Iterator[None]:
        """Backwards in the block sum in place, if `adds`."""
        self.adds = adds
        try:
            yield
        finally:
            self.adds = False

    @contextlib.contextmanager
    def deferring(self, queue: Deferred) -> Iterator[None]:
        """Backwards in the block leave weight gradients in `queue`; those that cannot wait are summed in place."""
        self.deferred, self.adds = queue, True
        try:
            yield
        finally:
            self.deferred, self.adds = None, False

    def _takes(self, layer: _Layer, of: LayerProducts, x: torch.Tensor, weight: nn.Parameter) -> bool:
        """Whether a forward on `x`, now, is one whose weight gradient may be taken over."""
        splits = self.splits and layer.splits
        writes = layer.large and (self.on or self.home is not _nowhere)
        if not (splits or writes) and id(weight) not in self._divided:
            return False
        return (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and weight.requires_grad
            and weight.is_floating_point()
            and type(x) in (_REHEARSED if self.runs else _INPUTS)
            and (splits or not torch.is_autocast_enabled(x.device.type))
            and (not x.is_floating_point() or x.dtype == weight.dtype or cast_of(of, x) is not None)
            and not weight._backward_hooks
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def _product(
        self,
        layer: _Layer,
        of: LayerProducts,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parameter: nn.Parameter,
    ) -> torch.Tensor:
        """`weight` is the parameter, or a view of it."""
        part = None
        if weight is not parameter:
            part = weight.shape, weight.stride(), int(weight.storage_offset() - parameter.storage_offset())
        own_bias = bias if isinstance(bias, nn.Parameter) and not bias._backward_hooks else None
        dtype = cast_of(of, x)
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        target = Target(parameter, part, own_bias)
        return Product.apply(x, weight, bias, of, self, layer.splits, target)  # type: ignore[no-any-return, no-untyped-call]


def _hooked(weight: nn.Parameter) -> bool:
    return bool(weight._backward_hooks) or bool(getattr(weight, "_post_accumulate_grad_hooks", None))


def _nowhere(parameter: nn.Parameter) -> None:
    """No gradient has a home."""
