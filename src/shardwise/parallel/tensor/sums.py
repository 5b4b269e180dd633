"""Gradients that every rank has a part of: summed after the backward, so that all ranks hold the same.

Two kinds: parameters held whole inside the divided region (q/k-norms), and what several ranks hold of a divided one
(key/value heads fewer than ranks). Knows names, gradients and slices.

    rank 0 holds heads 0 1, rank 1 holds heads 1 2:    shared = [1]    sum of rank 0's second and rank 1's first
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.collectives import TensorGroup

__all__ = ["sum_partial", "sum_shared"]


def sum_shared(parameters: Mapping[str, torch.Tensor], slices: Mapping[str, Slice], group: TensorGroup) -> None:
    """Sum into `.grad` what several ranks hold of `parameters`, as `slices` say, by the same names.

    One collective for each dtype. Every rank gives the same names; a parameter that has a gradient nowhere keeps none.
    """
    parts = {
        name: _shared(torch.zeros_like(p) if p.grad is None else p.grad, slices[name], group.rank)
        for name, p in sorted(parameters.items())
        if p.requires_grad and slices[name].shared
    }
    for dtype in dict.fromkeys(part.gradient.dtype for part in parts.values()):
        own = {name: part for name, part in parts.items() if part.gradient.dtype == dtype}
        has = [float(parameters[name].grad is not None) for name in own]
        given = [part.given().reshape(-1) for part in own.values()]
        flags = given[0].new_tensor(has)  # how many ranks have a gradient at all
        *totals, counts = torch.split(
            group.all_reduce(torch.cat([*given, flags])), [*(part.count for part in own.values()), len(own)]
        )
        for (name, part), total, count in zip(own.items(), totals, counts.tolist(), strict=True):
            if count:
                part.take(total)
                parameters[name].grad = part.gradient


def sum_partial(gradients: Mapping[str, torch.Tensor], plan: UnitPlan, group: TensorGroup) -> None:
    """Sum, in place, what must be summed of a unit's gradients; names as in the plan, `gradients` are local.

    One collective for each dtype, of everything in one buffer. Every rank gives the same names.
    """
    parts = [part for part in _parts(gradients, plan, group.rank) if part.count]
    for dtype in dict.fromkeys(part.gradient.dtype for part in parts):
        own = [part for part in parts if part.gradient.dtype == dtype]
        flat = group.all_reduce(torch.cat([part.given().reshape(-1) for part in own]))
        for part, total in zip(own, torch.split(flat, [part.count for part in own]), strict=True):
            part.take(total)


@dataclasses.dataclass(slots=True)
class _Part:
    """A gradient, and which of its indices along `dim` stand where among the shared ones (None: all is shared)."""

    gradient: torch.Tensor
    dim: int = 0
    here: list[int] | None = None
    there: list[int] = dataclasses.field(default_factory=list)
    num_shared: int = 0

    @property
    def count(self) -> int:
        if self.here is None:
            return self.gradient.numel()
        return self.gradient.numel() // self.gradient.shape[self.dim] * self.num_shared

    @property
    def _shape(self) -> tuple[int, ...]:
        shape = list(self.gradient.shape)
        shape[self.dim] = self.num_shared
        return tuple(shape)

    def given(self) -> torch.Tensor:
        """What this rank has of the shared indices, zero where others have them."""
        if self.here is None:
            return self.gradient
        shared = self.gradient.new_zeros(self._shape)
        shared[self._at(self.there)] = self.gradient[self._at(self.here)]
        return shared

    def take(self, total: torch.Tensor) -> None:
        if self.here is None:
            self.gradient.copy_(total.view(self.gradient.shape))
        else:
            self.gradient[self._at(self.here)] = total.view(self._shape)[self._at(self.there)]

    def _at(self, indices: list[int]) -> tuple[slice | list[int], ...]:
        return (*[slice(None)] * self.dim, indices)


def _parts(gradients: Mapping[str, torch.Tensor], plan: UnitPlan, rank: int) -> list[_Part]:
    found: list[_Part] = []
    for name in sorted(gradients):
        part = plan.slices.get(name)
        if name in plan.partial:
            found.append(_Part(gradients[name]))
        elif part is not None and part.shared:
            found.append(_shared(gradients[name], part, rank))
    return found


def _shared(gradient: torch.Tensor, part: Slice, rank: int) -> _Part:
    shared = {index: at for at, index in enumerate(i for start, stop in part.shared for i in range(start, stop))}
    held = [index for start, stop in part.ranges[rank] for index in range(start, stop)]
    here = [at for at, index in enumerate(held) if index in shared]
    there = [shared[index] for index in held if index in shared]
    return _Part(gradient, part.dim, here, there, len(shared))
