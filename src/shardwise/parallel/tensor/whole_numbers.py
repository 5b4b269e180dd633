"""Whole numbers that a model computes and gives to a unit (the expert of each token): spread over all they can be.

A trace knows their shape alone. With zeros only the first expert would be proven, and of experts that hand on what they
are given, which every rank has whole, none. How many there are is asked of the unit itself: the largest number that it
takes. Knows units and calls; refuses to know what the numbers mean.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.parallel.tensor.instance import Call, Doubled, twin

__all__ = ["with_whole_numbers"]

_MOST = 4096  # kinds of things that one number tells apart


def with_whole_numbers(unit: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """The calls with numbers from 0 to the largest that `unit`, which is real and in float64, takes."""
    return [_spread(unit, call) if call.counted else call for call in calls]


def _spread(unit: nn.Module, call: Call) -> Call:
    size = _num_taken(unit, call)
    generator = torch.Generator().manual_seed(0)

    def numbers(given: torch.Tensor) -> torch.Tensor:
        """Choices of one row (its last dim) are different ones, as those of `topk`."""
        if given.dim() and given.shape[-1] <= size:
            order = torch.rand(*given.shape[:-1], size, generator=generator).argsort(-1)
            return order[..., : given.shape[-1]].to(given.dtype)
        return torch.randint(0, size, tuple(given.shape), generator=generator).to(given.dtype)

    return _filled(call, numbers)


def _num_taken(unit: nn.Module, call: Call) -> int:
    """1 + the largest number that the unit runs with; what it takes without end is one of its experts, or 0 and 1."""
    if _takes(unit, call, _MOST - 1):
        stacks = [parameter.shape[0] for parameter in unit.parameters() if parameter.dim() > 2]
        lists = [len(module) for module in unit.modules() if isinstance(module, (nn.ModuleList, nn.ModuleDict))]
        return max([*stacks, *lists], default=2)
    least, most = 1, _MOST  # least is taken (or nothing is), most is not
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if _takes(unit, call, middle - 1) else (least, middle)
    return least


def _takes(unit: nn.Module, call: Call, number: int) -> bool:
    filled = _filled(call, lambda given: torch.full_like(given, number))
    args, kwargs = filled.fresh(seed=0)
    copied = twin(unit)
    copied.train(False)
    try:
        with torch.no_grad(), Doubled():
            copied(*args, **kwargs)
    except Exception:  # an index outside of its table, of any library
        return False
    return True


def _filled(call: Call, numbers: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    args, kwargs = copy.deepcopy((call.args, dict(call.kwargs)))
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for number in call.counted:
        leaves[tensors[number]] = numbers(leaves[tensors[number]])
    new_args, new_kwargs = tree_unflatten(leaves, spec)
    return dataclasses.replace(call, args=new_args, kwargs=new_kwargs)
