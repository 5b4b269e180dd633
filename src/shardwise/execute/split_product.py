"""A product with a weight as an autograd function whose weight gradient is returned, added, or left in a queue.

Knows one product and where its gradients go; refuses to know modules, and who decides what a backward does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
import torch.nn as nn

from shardwise.execute.deferred import Deferred, Part, add_gradient, is_summed
from shardwise.execute.layer_products import LayerProducts, Linear, Lookup

__all__ = ["Backward", "Product", "Target", "cast_of"]


class Backward(Protocol):
    """What the backward under way does with weight gradients: a queue takes them, or they are added in place."""

    @property
    def deferred(self) -> Deferred | None: ...

    @property
    def adds(self) -> bool: ...

    def home(self, parameter: nn.Parameter, /) -> torch.Tensor | None:
        """Where the first gradient of a parameter in a step may be computed, dense and shaped as it is."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where the gradients of a product go: a parameter or a part of it, and a bias that is a parameter."""

    weight: nn.Parameter
    part: Part | None
    bias: nn.Parameter | None

    def nodes(self) -> list[Any]:
        """What adds to their `.grad` in a backward."""
        own = [each for each in (self.weight, self.bias) if each is not None and each.requires_grad]
        return [torch.autograd.graph.get_gradient_edge(each).node for each in own]


def cast_of(of: LayerProducts, x: torch.Tensor) -> torch.dtype | None:
    """The type that torch casts the operands of a product to, now; None where it does not."""
    kind = x.device.type
    if not of.casts or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class Product(torch.autograd.Function):
    """The product of a layer; its backward computes the weight gradient, adds it, or leaves it in the queue."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        of: LayerProducts,
        now: Backward,
        splits: bool,
        target: Target,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        # the parameters themselves: what is saved comes back from a checkpoint as another tensor
        ctx.target = target
        ctx.of, ctx.now, ctx.splits = of, now, splits
        return of.output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        of: LayerProducts = ctx.of
        now: Backward = ctx.now
        target: Target = ctx.target
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        dx = of.input_gradient(dy, x, weight) if wants_x else None
        dw = None
        if wants_weight and (now.deferred is not None or now.adds) and _accumulates(ctx, target, weight):
            if now.deferred is not None and ctx.splits:
                own_bias = target.bias if wants_bias else None
                now.deferred.add(of, x, dy, target.weight, own_bias, target.part)
                wants_bias = wants_bias and own_bias is None
            elif is_summed(target.weight) and dy.dtype == target.weight.dtype:
                add_gradient(of, x, dy, target.weight, target.part)
            else:
                dw = _first(of, x, dy, weight, target, now)
        elif wants_weight and _accumulates(ctx, target, weight):
            dw = _first(of, x, dy, weight, target, now)
        elif wants_weight:
            dw = of.weight_gradient(dy, x, weight)
        return dx, dw, of.bias_gradient(dy) if wants_bias else None, None, None, None, None


def _first(
    of: LayerProducts, x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, target: Target, now: Backward
) -> torch.Tensor:
    """A weight gradient that autograd takes as it is, where nothing is to be added to: in its home, if it has one."""
    if target.part is None and target.weight.grad is None and isinstance(of, Linear | Lookup):
        home = now.home(target.weight)
        if home is not None and home.dtype == dy.dtype and isinstance(of, Lookup):
            of.add_weight_gradient(home.zero_(), dy, x, weight)
            return home
        if home is not None and isinstance(of, Linear) and home.dtype == dy.dtype == x.dtype:
            return of.weight_gradient(dy, x, weight, out=home)
    return of.weight_gradient(dy, x, weight)


def _accumulates(ctx: Any, target: Target, weight: torch.Tensor) -> bool:
    """Whether this backward adds to the `.grad` of all parameters it meets, and is not itself differentiated."""
    if torch.is_grad_enabled():
        return False
    direct = target.part is None and weight.dtype == target.weight.dtype
    nodes = [node for node, _ in ctx.next_functions[1:] if node is not None] if direct else target.nodes()
    try:
        return all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:  # a gradient is handed to who asked for it
        return False
