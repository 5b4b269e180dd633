"""Weight gradients summed where they live: `grad += dy^T x` as one matrix product, without a gradient to add.

Autograd computes the weight gradient of every micro-batch into a tensor of its own and adds it to `.grad`: it writes
the weight's size once and reads and writes it twice more. Here the product accumulates (BLAS: beta = 1), as
Megatron-LM's gradient accumulation fusion does on GPUs (arXiv:2104.04473 describes the system); an embedding adds
the rows that it looked up. Only inside units, for `nn.Linear` and `nn.Embedding` themselves and large weights.
Whatever else asks for a gradient (hooks, double backward, `autograd.grad` in a forward) gets it as from plain torch.
Layers that are divided among ranks, whose sums have another order anyway, also multiply by `products`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.execute import products

__all__ = ["SMALLEST", "WeightSums"]

SMALLEST = 2**17  # elements; below, a Python function costs more than the addition (measured: docs/log.md)


class WeightSums:
    """The switch of all modules that sum in place. Off, they are what they were.

    `running()` is around the forwards and backwards of a step, `adding()` around a backward whose weight gradients
    nobody waits for; outside of it gradients take autograd's way, with its hooks.
    """

    def __init__(self) -> None:
        self.on = False
        self.adds = False
        self._divided: set[int] = set()
        self._undo: list[tuple[nn.Module, Any]] = []

    def install(self, model: nn.Module, units: Sequence[str], held: Mapping[str, nn.Parameter]) -> None:
        """Give the modules inside `units` whose weight is one of `held` a forward that can sum in place."""
        own = {id(parameter) for parameter in held.values()}
        seen: set[int] = set()
        for unit in units:
            for module in model.get_submodule(unit).modules():
                if id(module) in seen or not _fits(module) or id(module.weight) not in own:
                    continue
                seen.add(id(module))
                self._undo.append((module, module.__dict__.get("forward")))
                if isinstance(module, nn.Linear):
                    module.__dict__["forward"] = _linear(self, module, module.forward)
                elif isinstance(module, nn.Embedding):
                    module.__dict__["forward"] = _embedding(self, module, module.forward)

    def divide(self, weights: Iterable[nn.Parameter]) -> None:
        """Of linear layers with one of these weights the large ones use `products`, in every step."""
        self._divided.update(id(weight) for weight in weights if weight.numel() >= products.SMALLEST)

    def close(self) -> None:
        """Give the modules their own forward back."""
        for module, before in reversed(self._undo):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
        self._undo.clear()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Forwards in the block may sum in place in their backward."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    @contextlib.contextmanager
    def adding(self, adds: bool) -> Iterator[None]:
        """Backwards in the block sum in place, if `adds`."""
        self.adds = adds
        try:
            yield
        finally:
            self.adds = False

    def may(self, module: nn.Module, x: torch.Tensor) -> bool:
        """Whether a forward of `module` on `x`, now, is one whose gradient may be summed in place."""
        weight = module.weight
        return (
            (self.on or id(weight) in self._divided)
            and torch.is_grad_enabled()
            and isinstance(weight, nn.Parameter)
            and weight.requires_grad
            and not weight._backward_hooks
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def into(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The gradient to add to, or None where autograd is to be given one."""
        gradient = weight.grad
        if not self.adds or gradient is None or torch.is_grad_enabled() or type(gradient) is not torch.Tensor:
            return None
        return gradient if gradient.is_contiguous() and gradient.dtype == weight.dtype else None


def _fits(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        plain = True
    elif type(module) is nn.Embedding:
        # on CUDA index_add is not deterministic, autograd's own gradient of an embedding is
        plain = not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None)
        plain = plain and module.weight.device.type == "cpu"
    else:
        return False
    weight = module._parameters.get("weight")
    return plain and weight is not None and weight.numel() >= SMALLEST and not _hooked(weight)


def _hooked(weight: nn.Parameter) -> bool:
    return bool(weight._backward_hooks) or bool(getattr(weight, "_post_accumulate_grad_hooks", None))


def _linear(sums: WeightSums, module: nn.Linear, body: Callable[..., Any]) -> Callable[..., Any]:
    def forward(input: torch.Tensor) -> Any:
        if not sums.may(module, input) or input.dtype != module.weight.dtype or type(input) is not torch.Tensor:
            return body(input)
        divided = id(module.weight) in sums._divided
        return _Linear.apply(input, module.weight, module.bias, sums, divided)  # type: ignore[no-untyped-call]

    return forward


def _embedding(sums: WeightSums, module: nn.Embedding, body: Callable[..., Any]) -> Callable[..., Any]:
    def forward(input: torch.Tensor) -> Any:
        if not sums.may(module, input) or type(input) is not torch.Tensor:
            return body(input)
        padding = -1 if module.padding_idx is None else module.padding_idx
        return _Embedding.apply(input, module.weight, padding, sums)  # type: ignore[no-untyped-call]

    return forward


class _Linear(torch.autograd.Function):
    """y = x W^T + b; x (..., in), W (out, in), b (out) or None."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sums: WeightSums, divided: bool
    ) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.sums, ctx.divided = sums, divided
        return products.linear(x, weight, bias) if divided else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        if not wants_x:
            dx = None
        elif ctx.divided and not torch.is_grad_enabled():  # a double backward is autograd's own
            dx = products.times(dy, weight)
        else:
            dx = dy @ weight
        rows = dy.reshape(-1, dy.shape[-1])
        db = rows.sum(0) if wants_bias else None
        dw = None
        if wants_weight:
            into = ctx.sums.into(weight)
            if into is None:
                dw = rows.t() @ x.reshape(-1, x.shape[-1])
            else:
                into.addmm_(rows.t(), x.reshape(-1, x.shape[-1]))
        return dx, dw, db, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a table (n, d) at indices of any shape; the row `padding` has no gradient."""

    @staticmethod
    def forward(ctx: Any, indices: torch.Tensor, weight: torch.Tensor, padding: int, sums: WeightSums) -> Any:
        ctx.save_for_backward(indices, weight)
        ctx.padding = padding
        ctx.sums = sums
        return F.embedding(indices, weight, None if padding < 0 else padding)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        indices, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        into = ctx.sums.into(weight)
        if into is None:
            dw = torch.ops.aten.embedding_backward(dy, indices, weight.shape[0], ctx.padding, False, False)
            return None, dw, None, None
        if ctx.padding >= 0:
            dy = dy.masked_fill((indices == ctx.padding).unsqueeze(-1), 0.0)
        into.index_add_(0, indices.reshape(-1), dy.reshape(-1, dy.shape[-1]))
        return None, None, None, None
