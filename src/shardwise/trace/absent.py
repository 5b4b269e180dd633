"""Absent tensors: shape, dtype and device of a value that this process does not hold, and no storage.

Whoever asks for the shape gets it; whoever computes with the value gets an error that names it. Zeros are never
answered: a missed dependency must be an error, never a plausible number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.errors import DataflowError

__all__ = ["Absent", "absent_parameter", "first_absent"]

# Operations that ask a tensor for its shape, dtype and device only.
_METADATA_ONLY = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "new_zeros new_ones new_empty new_full new_empty_strided "
        "zeros_like ones_like empty_like full_like rand_like randn_like"
    ).split()
)


class Absent(torch.Tensor):
    """A tensor without a value. `what` names it in errors: `layers.3#0 output 0`."""

    what: str

    @staticmethod
    def __new__(
        cls,
        *,
        what: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        strides: Sequence[int] | None = None,
        requires_grad: bool = False,
    ) -> Absent:
        tensor: Absent = torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            strides=None if strides is None else tuple(strides),
            dtype=dtype,
            device=torch.device(device),
            requires_grad=requires_grad,
        )
        tensor.what = what
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Absent({self.what}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default and isinstance(args[0], Absent):
            return _like(args[0])
        if func.overloadpacket in _METADATA_ONLY:
            leaves, spec = tree_flatten((args, dict(kwargs or {})))
            plain, named = tree_unflatten([_unwritten(leaf) for leaf in leaves], spec)
            return func(*plain, **named)
        absent = first_absent((args, kwargs))
        what = "an absent value" if absent is None else absent.what
        raise DataflowError(
            f"{what} is not on this stage, and {func} reads its value: the recorded dataflow does not say that it is "
            "needed here; trace the model again, or name the enclosing module as a unit"
        )


def _unwritten(leaf: object) -> object:
    """Memory of the same description, never read: for operations that take a tensor for its metadata."""
    if not isinstance(leaf, Absent):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)


def _like(tensor: Absent) -> Absent:
    return Absent(
        what=tensor.what, shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, strides=tensor.stride()
    )


def first_absent(tree: object) -> Absent | None:
    """The first absent tensor among the leaves of a structure, or None."""
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Absent):
            return leaf
    return None


def absent_parameter(
    *, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, requires_grad: bool
) -> torch.nn.Parameter:
    """A parameter that another stage holds: everything but its storage, so that `module.device` and shapes answer."""
    tensor = Absent(what=f"parameter {name}", shape=shape, dtype=dtype, device=device)
    return torch.nn.Parameter(tensor, requires_grad=requires_grad)
