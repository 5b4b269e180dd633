"""Weight gradients summed where they live, or put off: `grad += dy^T x` as one matrix product.

Autograd computes the weight gradient of every micro-batch into a tensor of its own and adds it to `.grad`: it writes
the weight's size once and reads and writes it twice more. Here the product accumulates (BLAS: beta = 1), as
Megatron-LM's gradient accumulation fusion does on GPUs (arXiv:2104.04473 describes the system); an embedding adds
the rows that it looked up. Where a backward is split, the same products wait in a queue (`deferred`).
Only inside units, for layers that torch, transformers and shardwise define (`layer_forwards`).
Whatever else asks for a gradient (hooks, double backward, `autograd.grad` in a forward) gets it as from plain torch.
Layers that are divided among ranks, whose sums have another order anyway, also multiply by `products`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.execute import products
from shardwise.execute.deferred import Deferred, is_summed
from shardwise.execute.layer_forwards import forward_of
from shardwise.execute.layer_products import LayerProducts, Linear

__all__ = ["SMALLEST", "WeightSums"]

SMALLEST = 2**17  # elements; below, a Python function costs more than the addition (measured: docs/log.md)
_INPUTS = (torch.Tensor, nn.Parameter)


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
        self.on = False
        self.splits = False
        self.adds = False
        self.deferred: Deferred | None = None
        self._divided: set[int] = set()
        self._layers: dict[int, _Layer] = {}
        self._undo: list[tuple[nn.Module, str, Any]] = []

    def install(self, model: nn.Module, units: Sequence[str], held: Mapping[str, nn.Parameter]) -> None:
        """Give the layers inside `units` whose weight is one of `held` a product that can be summed in place."""
        own = {id(parameter) for parameter in held.values()}
        for unit in units:
            for module in model.get_submodule(unit).modules():
                weight = module._parameters.get("weight")
                if id(module) in self._layers:
                    self._layers[id(module)].units.add(unit)
                elif weight is not None and id(weight) in own and not _hooked(weight):
                    self._take(_Layer(module, {unit}, weight.numel() >= SMALLEST))

    def _take(self, layer: _Layer) -> None:
        module = layer.module

        def product(of: LayerProducts, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
            if not self._takes(layer, x):
                return None
            weight = module._parameters["weight"]
            if self._divided and id(weight) in self._divided:
                of = dataclasses.replace(of, divided=True) if isinstance(of, Linear) else of
            out: torch.Tensor = _Product.apply(x, weight, bias, of, self, layer)  # type: ignore[no-untyped-call]
            return out

        found = forward_of(module, product)
        if found is None:
            return
        self._layers[id(module)] = layer
        for name, function in found.items():
            self._undo.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = function

    def divide(self, weights: Iterable[nn.Parameter]) -> None:
        """Of linear layers with one of these weights the large ones use `products`, in every step."""
        self._divided.update(id(weight) for weight in weights if weight.numel() >= products.SMALLEST)

    def keep_whole(self, units: Collection[str]) -> None:
        """The backward of these units is not split."""
        for layer in self._layers.values():
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
        self.on, self.splits = sums, splits
        try:
            yield
        finally:
            self.on = self.splits = False

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

    def _takes(self, layer: _Layer, x: torch.Tensor) -> bool:
        """Whether a forward on `x`, now, is one whose weight gradient may be taken over."""
        if not (self.on and layer.large) and not (self.splits and layer.splits) and not self._divided:
            return False
        weight = layer.module._parameters.get("weight")
        return (
            isinstance(weight, nn.Parameter)
            and ((self.on and layer.large) or (self.splits and layer.splits) or id(weight) in self._divided)
            and torch.is_grad_enabled()
            and weight.requires_grad
            and weight.is_floating_point()
            and type(x) in _INPUTS
            and (x.dtype == weight.dtype or not x.is_floating_point())
            and not weight._backward_hooks
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is None
        )


def _hooked(weight: nn.Parameter) -> bool:
    return bool(weight._backward_hooks) or bool(getattr(weight, "_post_accumulate_grad_hooks", None))


class _Product(torch.autograd.Function):
    """The product of a layer; its backward computes the weight gradient, adds it, or leaves it in the queue."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: nn.Parameter,
        bias: torch.Tensor | None,
        of: LayerProducts,
        sums: WeightSums,
        layer: _Layer,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # what is saved comes back without its gradient from a checkpoint
        ctx.bias = bias if isinstance(bias, nn.Parameter) and not bias._backward_hooks else None
        ctx.of, ctx.sums, ctx.layer = of, sums, layer
        return of.output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        of: LayerProducts = ctx.of
        sums: WeightSums = ctx.sums
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        dx = of.input_gradient(dy, x, weight) if wants_x else None
        dw = None
        if wants_weight and (sums.deferred is not None or sums.adds) and _accumulates(ctx):
            if sums.deferred is not None and ctx.layer.splits:
                own_bias = ctx.bias if wants_bias else None
                sums.deferred.add(of, x, dy, ctx.weight, own_bias)
                wants_bias = wants_bias and own_bias is None
            elif is_summed(ctx.weight):
                of.add_weight_gradient(ctx.weight.grad, dy, x, weight)
            else:
                dw = of.weight_gradient(dy, x, weight)
        elif wants_weight:
            dw = of.weight_gradient(dy, x, weight)
        return dx, dw, of.bias_gradient(dy) if wants_bias else None, None, None, None


def _accumulates(ctx: Any) -> bool:
    """Whether this backward adds to the `.grad` of all parameters it meets, and is not itself differentiated."""
    if torch.is_grad_enabled():
        return False
    try:
        return all(node is None or torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions[1:])
    except RuntimeError:  # a gradient is handed to who asked for it
        return False
