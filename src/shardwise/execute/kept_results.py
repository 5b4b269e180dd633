"""Results of a forward that are kept while the rest of it is computed again, by the order in which they were made.

    forward   x ─norm─► n ─linear─► y¹ ─gelu─► g ─linear─► y²       keeps y¹ and y²
    again     x ─norm─► n ───────── y¹ ─gelu─► g ───────── y²       multiplies nothing

A result that somebody writes into later (a sum over ranks in place) is let go of, and computed again. Knows operations
below autograd; no modules, no checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._C._autograd import _make_saved_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.errors import DataflowError
from shardwise.trace.kept_products import is_kept

__all__ = ["KeptResults"]

Weights = Callable[[], frozenset[int]]  # addresses of the storages in which the parameters lie, now


@dataclasses.dataclass(slots=True)
class _Kept:
    func: Any
    result: torch.Tensor | None
    saved: Any = None  # the same, once autograd keeps it


class KeptResults:
    """The kept results of one call of a unit. `weights` tells where the unit's parameters lie."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._kept: list[_Kept] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(kept.result.nbytes for kept in self._kept if kept.result is not None)  # before `settle`

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Around the forward: keep results."""
        with _Keep(self._kept, self._weights):
            yield

    def settle(self) -> None:
        """Behind the forward: autograd keeps the results as it keeps all else, so that who moves that moves these."""
        for kept in self._kept:
            if kept.result is not None:
                kept.saved, kept.result = _make_saved_tensor(kept.result, is_output=False), None

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Around the repetition: give them out again."""
        with _GiveOut(list(self._kept), self._weights):
            yield


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, into: list[_Kept], weights: Weights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._into, self._weights = into, weights
        self._lie_at: dict[int, _Kept] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _keeps(func, args, self._weights) and isinstance(out, torch.Tensor):
            kept = _Kept(func, out.detach())
            self._into.append(kept)
            self._lie_at[out.untyped_storage()._cdata] = kept
        elif func._schema.is_mutable:
            self._written(func, args)
        return out

    def _written(self, func: Any, args: Sequence[Any]) -> None:
        for about, value in zip(func._schema.arguments, args, strict=False):
            if about.alias_info is None or not about.alias_info.is_write:
                continue
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, torch.Tensor) and (kept := self._lie_at.get(tensor.untyped_storage()._cdata)):
                    kept.result = None


class _GiveOut(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kept: list[_Kept], weights: Weights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._weights = iter(kept), weights

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not _keeps(func, args, self._weights):
            return func(*args, **(kwargs or {}))
        kept = next(self._kept, None)
        if kept is None or kept.func is not func:
            raise DataflowError(
                f"a unit that is computed again does what it did at first, but it now multiplies by {func} where it "
                f"did {'nothing more' if kept is None else kept.func}; use recompute=full, or none"
            )
        result = kept.result if kept.saved is None else kept.saved.unpack()
        kept.saved = None
        return func(*args, **(kwargs or {})) if result is None else result.detach()


def _keeps(func: Any, args: Sequence[Any], weights: Weights) -> bool:
    name = func._schema.name
    if is_kept(name, has_weight=False):
        return True
    if not is_kept(name, has_weight=True):
        return False
    here = weights()
    return any(isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() in here for each in args)
