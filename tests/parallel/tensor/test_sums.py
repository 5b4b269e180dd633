"""Gradients of what several ranks hold a part of are summed over their holders, in one collective."""

from __future__ import annotations

import torch
import torch.nn as nn

from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.slices import cut, paste
from shardwise.parallel.tensor.sums import sum_shared
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads

OVERLAPPING = Slice(dim=0, size=6, ranges=(((0, 4),), ((2, 6),)))  # rows 2 and 3 on both
EVERYWHERE = Slice(dim=1, size=3, ranges=(((0, 3),), ((0, 3),)))
APART = Slice.even(0, 4, 2)


def values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counted:
    """A group that counts its sums."""

    def __init__(self, group: ThreadGroup) -> None:
        self.rank, self.size, self.sums = group.rank, group.size, 0
        self._group = group

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        return self._group.all_reduce(tensor)


def test_holders_get_the_sum_and_others_keep_theirs_in_one_collective() -> None:
    shapes = {"a": (6, 2), "b": (2, 3)}
    slices = {"a": OVERLAPPING, "b": EVERYWHERE}

    def gradient(name: str, rank: int) -> torch.Tensor:
        return cut(values(*shapes[name], seed=10 * rank + len(shapes[name]) + ord(name)), slices[name], rank)

    totals = {
        name: torch.stack([paste(gradient(name, rank), slices[name], rank) for rank in range(2)]).sum(0)
        for name in shapes
    }

    def work(group: ThreadGroup) -> None:
        counted = Counted(group)
        parameters = {name: nn.Parameter(torch.zeros_like(gradient(name, group.rank))) for name in shapes}
        for name, parameter in parameters.items():
            parameter.grad = gradient(name, group.rank)
        sum_shared(parameters, slices, counted)  # type: ignore[arg-type]
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad, cut(totals[name], slices[name], group.rank))
        assert counted.sums == 1

    on_threads(2, work)


def test_a_gradient_that_one_rank_lacks_is_a_zero_there_and_one_that_all_lack_stays_missing() -> None:
    slices = {"some": EVERYWHERE, "none": EVERYWHERE, "apart": APART}

    def work(group: ThreadGroup) -> None:
        parameters = {name: nn.Parameter(torch.zeros(2, 3)) for name in slices}
        if group.rank == 1:
            parameters["some"].grad = torch.ones(2, 3)
        parameters["apart"].grad = torch.full((2, 3), float(group.rank))
        sum_shared(parameters, slices, group)
        assert parameters["some"].grad is not None
        assert torch.equal(parameters["some"].grad, torch.ones(2, 3))
        assert parameters["none"].grad is None  # an optimizer skips it, as on one device
        assert torch.equal(parameters["apart"].grad, torch.full((2, 3), float(group.rank)))

    on_threads(2, work)
