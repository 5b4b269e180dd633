"""A call of a unit with long sequences as one with short ones: what is proven of these holds for those.

How a unit works on tokens does not depend on how many there are, and a proof in float64 of thousands takes minutes.
Knows captured calls; no plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.parallel.tensor.instance import Call
from shardwise.parallel.tensor.propose import argument_names

__all__ = ["shortened"]

_LONG = 256  # tokens: more than these are cut
_SHORT = 64


def shortened(unit: nn.Module, call: Call, names: Mapping[str, int], *, ranks: int) -> Call:
    """`call` with the sequences of its arguments `names` (with their dims of tokens) cut to some tens of tokens, and
    masks and tables along them; the same call where they are short. Long sequences of two lengths stay two lengths."""
    lengths: set[int] = set()
    for place, name in argument_names(unit, call).items():
        if name in names and call.tensors[place].shape[names[name]] > _LONG:
            lengths.add(call.tensors[place].shape[names[name]])
    if not lengths:
        return call
    short = {length: max(_SHORT, 8 * ranks) + number for number, length in enumerate(sorted(lengths))}
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    number = 0
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[place] = _cut(leaf, short, activations=number in call.requires_grad)
            number += 1
    made: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, spec)
    return dataclasses.replace(call, args=made[0], kwargs=made[1])


def _cut(tensor: torch.Tensor, short: Mapping[int, int], *, activations: bool) -> torch.Tensor:
    dims = (-2,) if activations and tensor.dim() > 1 else range(-tensor.dim(), 0)
    for dim in dims:
        if tensor.shape[dim] in short:
            tensor = tensor.narrow(dim, 0, short[tensor.shape[dim]])
    return tensor.contiguous()
