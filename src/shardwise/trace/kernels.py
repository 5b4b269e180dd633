"""Every dispatched operation as a kernel: what it multiplies, attends to, or reads and writes.

Views, allocations and questions are free. A product that makes the gradient of a parameter is told from the one that
makes its input's by its operands: no weight is among them. What does not come from the batch (parameters, buffers,
what is computed of these alone) does not grow with it. Knows names and arguments of operations; no nodes, no units.

    addmm(bias, x, W)        MATMUL (1, rows of x, columns of W, width)   grows with the rows
    its backward             MATMUL of dy and W: INPUT; of dy and x: WEIGHT, as long as the rows; sum(dy): WEIGHT
    gelu(x)                  MEMORY, x and what it makes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch

from shardwise.describe.kernels import Kernel, KernelKind, Phase

__all__ = ["Described", "Operands", "described", "mirrored"]

_ATTENTION = "aten::_scaled_dot_product_"
_PRODUCTS = {
    "aten::mm": 0,
    "aten::addmm": 1,
    "aten::bmm": 0,
    "aten::baddbmm": 1,
    "aten::addbmm": 1,
    "aten::_scaled_mm": 0,
}
_GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
_GROUPED_BACKWARD = "transformers::grouped_mm_fallback_backward"
_CONVOLUTION_BACKWARD = "aten::convolution_backward"

# Answer without touching elements: memory is asked for, or a number is looked at.
_FREE = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::resize_",
        "aten::set_",
        "aten::lift",
        "aten::lift_fresh",
        "aten::detach",
        "aten::alias",
        "aten::_local_scalar_dense",
        "aten::is_same_size",
        "aten::_has_compatible_shallow_copy_type",
        "aten::_assert_async",
        "aten::is_pinned",
        "prim::device",
    }
)
# Of the first tensor only the rows that are named are read, each as long as the row that is written.
_GATHERS = frozenset({"aten::embedding", "aten::index", "aten::index_select", "aten::gather", "aten::take"})
# Rows that are named are read, added to and written; the rest of the first tensor is left alone.
_SCATTERS = frozenset(
    {
        "aten::index_add_",
        "aten::index_copy_",
        "aten::index_put_",
        "aten::_index_put_impl_",
        "aten::scatter_",
        "aten::scatter_add_",
        "aten::scatter_reduce_",
    }
)
_OVERWRITES = frozenset(
    {
        "aten::copy_",
        "aten::fill_",
        "aten::zero_",
        "aten::normal_",
        "aten::uniform_",
        "aten::bernoulli_",
        "aten::random_",
        "aten::exponential_",
        "aten::ones_like",
        "aten::zeros_like",
        "aten::full_like",
        "aten::rand_like",
        "aten::randn_like",
        "aten::randint_like",
        "aten::new_zeros",
        "aten::new_ones",
        "aten::new_full",
        "aten::nll_loss_forward",  # one element of a row
        "aten::nll_loss2d_forward",
    }
)
_SECOND_UNREAD = frozenset({"aten::nll_loss_backward", "aten::nll_loss2d_backward"})
_EMBEDDING_BACKWARD = "aten::embedding_dense_backward"
_SUMS = frozenset({"aten::add", "aten::add_"})


@dataclasses.dataclass(slots=True)
class Operands:
    """Tensors of one operation with the numbers of their storages, and what is known of these.

    weights: storages that are parameters, or made of these alone. fixed: those that do not come from the batch, weights
    among them.
    """

    inputs: Sequence[tuple[torch.Tensor, int]]
    outputs: Sequence[tuple[torch.Tensor, int]]
    weights: set[int]
    fixed: set[int]

    def is_fixed(self, tensor: torch.Tensor) -> bool:
        return any(key in self.fixed for each, key in self.inputs if each is tensor)

    def is_weight(self, tensor: torch.Tensor) -> bool:
        return any(key in self.weights for each, key in self.inputs if each is tensor)

    @property
    def has_weight(self) -> bool:
        return any(key in self.weights for _, key in self.inputs)


Described = tuple[KernelKind, Phase, str, int, int, tuple[int, ...], tuple[int, ...], int]  # fields of a Kernel


def described(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    operands: Operands,
    *,
    flops: int,
    phase: Phase,
    of_weight: bool = False,
) -> list[Described]:
    """The kernels of one operation, as a rule one or none.

    phase: FORWARD, or INPUT for the backward. of_weight: it stands in the backward of a product with a trained weight.
    """
    name = func._schema.name
    if of_weight and not operands.has_weight and name != _CONVOLUTION_BACKWARD:
        meeting = name in _SUMS and not all(key in operands.fixed for _, key in operands.inputs)
        phase = phase if meeting else Phase.WEIGHT  # gradients of an input that several read are added up there too
    if flops:
        return list(_with_flops(name, func, args, kwargs, operands, flops, phase))
    if name in _FREE or _is_view(func, operands):
        return []
    nbytes, own = _moved(name, operands, phase)
    if not nbytes:
        return []
    dtype = _dtype([tensor for tensor, _ in (*operands.outputs, *operands.inputs)])
    return [(KernelKind.MEMORY, phase, dtype, 0, nbytes, (), (), own)]


def mirrored(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """A backward that nobody saw, of these forwards: each product once for its input and once for its weight, each of
    the others twice for its input."""
    found: list[Kernel] = []
    for kernel in kernels:
        if kernel.kind is KernelKind.MATMUL:
            found += [dataclasses.replace(kernel, phase=phase) for phase in (Phase.INPUT, Phase.WEIGHT)]
        else:
            found.append(dataclasses.replace(kernel, phase=Phase.INPUT, count=2 * kernel.count))
    return tuple(found)


# -- products -----------------------------------------------------------------------------------------


def _with_flops(
    name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands, flops: int, phase: Phase
) -> Iterator[Described]:
    nbytes, own = _moved(name, operands, phase)
    if name.startswith(_ATTENTION):
        yield _attention(name, func, args, kwargs, flops, nbytes, own, phase)
    elif name in _PRODUCTS:
        first = _PRODUCTS[name]
        yield _product(args[first], args[first + 1], operands, flops, nbytes, own, phase)
    elif name in _GROUPED:
        yield _grouped(args, kwargs, flops, nbytes, own, phase)
    elif name == _GROUPED_BACKWARD:  # of both operands at once
        for which in (Phase.INPUT, Phase.WEIGHT):
            shape, dims = _of_result(operands, flops // 2, which)
            yield KernelKind.MATMUL, which, _dtype(args), flops // 2, nbytes // 2, shape, dims, own // 2
    elif name == _CONVOLUTION_BACKWARD:
        yield from _convolution_backward(args, flops)
    elif name.endswith("convolution"):
        shape = _of_convolution(args[0], args[1], _argument(func, args, kwargs, "groups") or 1, flops)
        yield KernelKind.MATMUL, phase, _dtype(args), flops, nbytes, shape, (1,), own
    else:  # whatever else torch counts flops of
        shape, dims = _of_result(operands, flops, phase)
        yield KernelKind.MATMUL, phase, _dtype(args), flops, nbytes, shape, dims, own


def _product(
    a: torch.Tensor, b: torch.Tensor, operands: Operands, flops: int, nbytes: int, own: int, phase: Phase
) -> Described:
    """a (…, m, k) times b (…, k, n)."""
    batch = a.shape[0] if a.dim() == 3 else 1
    shape = (batch, a.shape[-2], b.shape[-1], a.shape[-1])
    return KernelKind.MATMUL, phase, _dtype((a,)), flops, nbytes, shape, _growing(a, b, operands, phase), own


def _growing(a: torch.Tensor, b: torch.Tensor, operands: Operands, phase: Phase) -> tuple[int, ...]:
    """Which of (batch, m, n, k) are samples'."""
    if phase is Phase.WEIGHT:
        return (3,)
    fixed = operands.is_fixed(a), operands.is_fixed(b)
    repeated = any(own and each.stride(0) == 0 for own, each in zip(fixed, (a, b), strict=True))
    if a.dim() == 3 and (repeated or fixed == (False, False)):
        return (0,)
    return {(False, True): (1,), (True, False): (2,), (True, True): ()}.get(fixed, (1,))


def _grouped(
    args: Sequence[Any], kwargs: Mapping[str, Any], flops: int, nbytes: int, own: int, phase: Phase
) -> Described:
    """(tokens, k) times (groups, k, n), and its backward (k, tokens) times (tokens, n): even groups."""
    a, b = args[0], args[1]
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    groups = max(1, ends.shape[0] if ends is not None else max(a.shape[0] if a.dim() == 3 else 1, b.shape[0]))
    dims: tuple[int, ...] = (1,)
    if a.dim() == b.dim() == 2:
        shape, dims = (groups, a.shape[0], b.shape[1], -(-a.shape[1] // groups)), (3,)
    elif a.dim() == 3 and b.dim() == 2:
        shape, dims = (groups, a.shape[1], -(-b.shape[1] // groups), a.shape[2]), (2,)
    else:
        rows = a.shape[-2] if a.dim() == 3 else -(-a.shape[0] // groups)
        shape = (groups, rows, b.shape[-1], a.shape[-1])
    return KernelKind.MATMUL, phase, _dtype((a,)), flops, nbytes, shape, dims, own


def _of_convolution(x: torch.Tensor, weight: torch.Tensor, groups: int, flops: int) -> tuple[int, int, int, int]:
    """As a product of patches: (groups, samples times places, channels out, channels in times window)."""
    n, k = max(1, weight.shape[0] // groups), max(1, prod(weight.shape[1:]))
    return groups, max(1, flops // (2 * groups * n * k)), n, k


def _convolution_backward(args: Sequence[Any], flops: int) -> Iterator[Described]:
    """Gradients of the input and of the weight, each of the result's gradient and the other one."""
    gradient, x, weight, groups, asked = args[0], args[1], args[2], args[9], args[10]
    wanted = [phase for phase, asks in ((Phase.INPUT, asked[0]), (Phase.WEIGHT, asked[1])) if asks]
    own = _touched(gradient) + _touched(x)
    for which in wanted:
        groups, m, n, k = _of_convolution(x, weight, groups, flops // len(wanted))
        shape, dims = ((groups, m, k, n), (1,)) if which is Phase.INPUT else ((groups, n, k, m), (3,))
        nbytes = own + _touched(weight)
        yield KernelKind.MATMUL, which, _dtype((x,)), flops // len(wanted), nbytes, shape, dims, own


def _of_result(operands: Operands, flops: int, phase: Phase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A product with as many flops whose result is as large as what is written."""
    largest = max((tensor for tensor, _ in operands.outputs), key=lambda tensor: tensor.numel())
    n = max(1, largest.shape[-1] if largest.dim() else 1)
    m = max(1, largest.numel() // n)
    return (1, m, n, max(1, flops // (2 * m * n))), (3,) if phase is Phase.WEIGHT else (1,)


def _attention(
    name: str,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flops: int,
    nbytes: int,
    own: int,
    phase: Phase,
) -> Described:
    """query (…, heads, queries, width), key (…, heads, keys, width), value (…, heads, keys, values)."""
    query, key, value = args[1:4] if name.endswith("_backward") else args[:3]
    queries, keys = query.shape[-2], key.shape[-2]
    if _argument(func, args, kwargs, "is_causal"):
        flops = flops * _seen(queries, keys) // max(1, queries * keys)
    shape = (prod(query.shape[:-2]), queries, keys, query.shape[-1], value.shape[-1])
    return KernelKind.ATTENTION, phase, _dtype((query,)), flops, nbytes, shape, (0,), own


def _seen(queries: int, keys: int) -> int:
    """Pairs of a query and a key before it, or at its place; the first query is at the first key."""
    full = max(0, queries - keys)  # queries behind the last key
    rest = queries - full
    return rest * (rest + 1) // 2 + full * keys


# -- bytes --------------------------------------------------------------------------------------------


def _is_view(func: Any, operands: Operands) -> bool:
    if func.is_view:
        return True
    if func._schema.is_mutable:
        return False
    given = {key for _, key in operands.inputs}
    return bool(operands.outputs) and all(key in given for _, key in operands.outputs)


def _moved(name: str, operands: Operands, phase: Phase) -> tuple[int, int]:
    """Bytes that are read and written, each tensor once, and of these those that grow with the batch."""
    inputs, outputs = list(operands.inputs), list(operands.outputs)
    written = inputs[0][0] if name.endswith("_") and inputs else None
    first_fixed = bool(inputs) and inputs[0][1] in operands.fixed
    total = own = 0

    def add(nbytes: int, *, fixed: bool) -> None:
        nonlocal total, own
        total += nbytes
        own += 0 if fixed else nbytes

    if name in _GATHERS or name in _SCATTERS or name in _OVERWRITES:
        inputs = inputs[1:]
    elif name in _SECOND_UNREAD:
        inputs = inputs[:1] + inputs[2:]
    if name in _SCATTERS:
        sources = [_touched(tensor) for tensor, _ in inputs if tensor.is_floating_point()]
        add(2 * sum(sources), fixed=False)
        outputs = []
    if name in _GROUPED:  # ends of groups, not tokens
        inputs = inputs[:2]
    fixed_result = phase is Phase.WEIGHT or (
        bool(operands.inputs) and all(key in operands.fixed for _, key in operands.inputs)
    )
    seen: set[int] = set()
    for tensor, key in inputs:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            add(_touched(tensor), fixed=key in operands.fixed)
    for tensor, key in outputs:
        fixed = first_fixed if tensor is written else fixed_result or key in operands.fixed
        add(_touched(tensor), fixed=fixed)
        if name in _GATHERS:
            add(_touched(tensor), fixed=fixed)
    if name == _EMBEDDING_BACKWARD and inputs:
        add(2 * _touched(inputs[0][0]), fixed=False)
    return total, own


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of the elements that a tensor shows, each once: an expanded one has fewer than its shape says."""
    shape, strides = tensor.shape, tensor.stride()
    count = 1
    for size, stride in zip(shape, strides, strict=True):
        if stride or not size:
            count *= size
    return int(count * tensor.element_size())


def _dtype(tensors: Sequence[Any]) -> str:
    """Of the first floating tensor, else of the first."""
    known = [tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor)]
    floating = [dtype for dtype in known if dtype.is_floating_point]
    return str((floating or known or [torch.float32])[0]).removeprefix("torch.")


def _argument(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: str) -> Any:
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == wanted:
            return args[place] if place < len(args) else kwargs.get(wanted, argument.default_value)
    return None
