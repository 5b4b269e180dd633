"""What an aten op does to memory, as its schema and a short list tell: writes it, hides it, leaves it.

It knows ops and views. It runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from shardwise.trace.recipe import View

__all__ = ["argument_names", "covers", "hides", "leaves_unwritten", "written_storages"]

aten = torch.ops.aten

# What these return has no content that anyone may rely on; replayed it is zero.
_UNWRITTEN = frozenset(
    {
        aten.empty,
        aten.empty_like,
        aten.empty_strided,
        aten.empty_permuted,
        aten.new_empty,
        aten.new_empty_strided,
    }
)
# In-place ops that do not look at what was there before.
_HIDING = frozenset(
    {aten.zero_, aten.fill_, aten.copy_, aten.normal_, aten.uniform_, aten.bernoulli_, aten.random_}
    | {aten.exponential_, aten.geometric_, aten.cauchy_, aten.log_normal_}
)


def leaves_unwritten(func: OpOverload) -> bool:
    """Whether the op returns memory that it has not written."""
    return func.overloadpacket in _UNWRITTEN


def hides(func: OpOverload, inputs: Sequence[View], num_bytes: int) -> bool:
    """Whether the op overwrites all of the storage (of `num_bytes`) of its first input, unseen."""
    return func.overloadpacket in _HIDING and covers(inputs, num_bytes)


def covers(inputs: Sequence[View], num_bytes: int) -> bool:
    """Whether the first input is all of its storage, and no other one looks there."""
    first = inputs[0]
    whole = math.prod(first.shape) * first.dtype.itemsize == num_bytes
    stretched = any(stride == 0 and size > 1 for size, stride in zip(first.shape, first.strides, strict=True))
    return whole and not stretched and all(view.storage != first.storage for view in inputs[1:])


def written_storages(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[int]:
    """The storages whose content an op changes."""
    given = {**kwargs, **dict(zip(argument_names(func), args, strict=False))}
    return frozenset(
        leaf.storage
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(given.get(argument.name))
        if isinstance(leaf, View)
    )


@cache
def argument_names(func: OpOverload) -> tuple[str, ...]:
    """The names of the arguments, in the order of the schema."""
    return tuple(argument.name for argument in func._schema.arguments)
