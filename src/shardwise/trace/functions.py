"""Torch functions as the glue calls them: names, constructors; what is seen as one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
import torch._functorch.apis as functorch
from torch._functorch.vmap import vmap_impl
from torch.overrides import TorchFunctionMode

__all__ = [
    "SeesLosses",
    "as_one_call",
    "as_one_function",
    "grouped_mm_like",
    "is_constructor",
    "looks_at_arguments",
    "loss_of",
    "name_of",
    "seen_loss",
    "vmapped",
]

_VMAP = vmap_impl

# Functions that take a tensor for its shape, dtype and device only.
_CONSTRUCTORS = frozenset(
    {
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        torch.full_like,
        torch.rand_like,
        torch.randn_like,
        torch.Tensor.new_zeros,
        torch.Tensor.new_ones,
        torch.Tensor.new_empty,
        torch.Tensor.new_full,
    }
)

# Functions that make a tensor of numbers, some of which may be tensors.
_LOOKS_AT_ARGUMENTS = frozenset({torch.tensor, torch.Tensor.new_tensor})


def is_constructor(func: Any) -> bool:
    """Whether `func` reads only the metadata of its tensor arguments."""
    return func in _CONSTRUCTORS


def looks_at_arguments(func: Any) -> bool:
    """Whether `func` reads the values of tensors that it is given in a way that no dispatch mode sees."""
    return func in _LOOKS_AT_ARGUMENTS


def vmapped(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `torch.vmap(func, ...)(...)` computes: the node of such a call, with arguments as torch itself hands on."""
    return _VMAP(func, *args, **kwargs)


@runtime_checkable
class SeesLosses(Protocol):
    """A mode that is told where the loss is computed."""

    def loss(self, function: Callable[[Any, Any], torch.Tensor], outputs: Any, batch: Any) -> torch.Tensor:
        """`function(outputs, batch)`, as one function (`loss_of`) or function by function."""
        ...


def loss_of(function: Callable[[Any, Any], torch.Tensor], outputs: Any, batch: Any) -> torch.Tensor:
    """A loss: the node of one that is seen as one function, because it looks at values."""
    return function(outputs, batch)


def seen_loss(function: Callable[[Any, Any], torch.Tensor], outputs: Any, batch: Any) -> torch.Tensor:
    """`function(outputs, batch)`, of which the innermost mode that asks for it is told."""
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    seer = next((mode for mode in reversed(modes) if isinstance(mode, SeesLosses)), None)
    return function(outputs, batch) if seer is None else seer.loss(function, outputs, batch)


def as_one_call(mode: TorchFunctionMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)` as one call to a mode that is open, which sees nothing of what is inside."""
    with _closed(mode):
        return mode.__torch_function__(func, (), args, kwargs)  # type: ignore[no-untyped-call]


def grouped_mm_like(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """An empty tensor with the shape of a grouped matrix product: torch's own shape rule refuses float32.

    (tokens, k) x (groups, k, n) -> (tokens, n); (m, k) x (k, n) -> (groups, m, n); (groups, m, k) x (k, n) -> (m, n);
    (groups, m, k) x (groups, k, n) -> (groups, m, n).
    """
    groups = () if offs is None or a.dim() != 2 or b.dim() != 2 else (offs.shape[0],)
    if a.dim() == 3 and b.dim() == 3:
        groups = (a.shape[0],)
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)


def name_of(func: Any) -> str:
    """A readable name: `add`, `cross_entropy`, `T` for the getter of a property."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return str(name)


@contextlib.contextmanager
def as_one_function(active: Callable[[], TorchFunctionMode | None]) -> Iterator[None]:
    """While open, `SomeFunction.apply(...)` and `torch.vmap(f)(...)` reach the mode of `active()` as one call each.

    Torch's function modes see the operations inside of both, not the function; inside `vmap` those are on tensors
    that have one dim less than their values, and what ends it no mode sees.
    """
    original = torch.autograd.Function.__dict__["apply"]
    inner = original.__func__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        mode = active()
        if mode is None or not _is_open(mode):
            return inner(cls, *args, **kwargs)  # no glue, or inside of a function that the mode has been told of
        return as_one_call(mode, _Apply(cls, inner), args, kwargs)

    def vmap(*args: Any, **kwargs: Any) -> Any:
        mode = active()
        if mode is None or not _is_open(mode):
            return before(*args, **kwargs)
        return as_one_call(mode, vmapped, args, kwargs)

    before = vars(functorch)["vmap_impl"]
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    vars(functorch)["vmap_impl"] = vmap
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
        vars(functorch)["vmap_impl"] = before


def _is_open(mode: TorchFunctionMode) -> bool:
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(each is mode for each in modes)


@contextlib.contextmanager
def _closed(mode: TorchFunctionMode) -> Iterator[None]:
    """`mode` off the stack, those that were opened after it still on it."""
    above: list[TorchFunctionMode] = []
    while (top := torch.overrides._pop_mode()) is not mode:  # type: ignore[no-untyped-call]
        above.append(top)
    for each in reversed(above):
        torch.overrides._push_mode(each)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for _ in above:
            torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
        for each in (mode, *reversed(above)):
            torch.overrides._push_mode(each)  # type: ignore[no-untyped-call]


class _Apply:
    """`cls.apply` as a function that compares equal to itself."""

    def __init__(self, cls: type, inner: Callable[..., Any]) -> None:
        self.cls = cls
        self.inner = inner
        self.__name__ = cls.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(self.cls, *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Apply) and other.cls is self.cls

    def __hash__(self) -> int:
        return hash(self.cls)
