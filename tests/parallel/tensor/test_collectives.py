"""Differentiable collectives, on ranks that are threads and on ranks that are processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from shardwise.describe.tensor import Slice
from shardwise.launch import RankContext
from shardwise.parallel.tensor.collectives import TensorGroup, copy_to, gather_from, reduce_from, scatter_to
from shardwise.parallel.tensor.processes import ProcessTensorGroup
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads
from shardwise.testing import on_ranks

HALVES = Slice.even(0, 4, 2)


def test_a_copy_sums_gradients_and_a_sum_hands_them_through() -> None:
    def work(group: ThreadGroup) -> tuple[list[float], list[float]]:
        x = torch.ones(2, requires_grad=True)
        y = reduce_from(copy_to(x, group) * (group.rank + 1), group)
        y.backward(torch.tensor([1.0, 10.0]))
        assert x.grad is not None
        return y.tolist(), x.grad.tolist()

    # y = 1·x + 2·x on both, dx = (1 + 2)·dy
    assert on_threads(2, work) == [([3.0, 3.0], [3.0, 30.0])] * 2


def test_parts_of_a_whole_and_back() -> None:
    def work(group: ThreadGroup) -> tuple[list[float], list[float]]:
        x = torch.arange(4.0, requires_grad=True)
        y = gather_from(scatter_to(x, HALVES, group) * 2, HALVES, group)
        y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert x.grad is not None
        return y.tolist(), x.grad.tolist()

    assert on_threads(2, work) == [([0.0, 2.0, 4.0, 6.0], [2.0, 4.0, 6.0, 8.0])] * 2


def test_a_slice_that_all_ranks_hold_is_a_copy() -> None:
    everything = Slice(dim=0, size=2, ranges=(((0, 2),), ((0, 2),)))

    def work(group: ThreadGroup) -> list[float]:
        x = torch.ones(2, requires_grad=True)
        (scatter_to(x, everything, group) * (group.rank + 1)).sum().backward()
        assert x.grad is not None
        return x.grad.tolist()

    assert on_threads(2, work) == [[3.0, 3.0]] * 2


def test_a_copy_may_be_written_into() -> None:
    def work(group: ThreadGroup) -> list[float]:
        x = torch.ones(2, requires_grad=True)
        y = copy_to(x * 1, group)
        y *= 2
        y.sum().backward()
        assert x.grad is not None
        return x.grad.tolist()

    assert on_threads(2, work) == [[4.0, 4.0]] * 2


def test_blocks_are_gathered_in_order_and_each_rank_gets_the_sum_of_its_own() -> None:
    def work(group: ThreadGroup) -> None:
        given = torch.arange(12.0).view(3, 2, 2) * (group.rank + 1)
        kept = given.clone()
        assert torch.equal(
            group.all_gather(given), torch.stack([torch.arange(12.0).view(3, 2, 2) * n for n in (1, 2, 3)])
        )
        assert torch.equal(group.reduce_scatter(given), torch.arange(12.0).view(3, 2, 2)[group.rank] * 6)
        assert torch.equal(given, kept)

    on_threads(3, work)


def test_a_rank_that_raises_ends_the_others() -> None:
    def work(group: ThreadGroup) -> None:
        if group.rank == 1:
            raise KeyError("rank 1")
        group.all_reduce(torch.ones(1))

    with pytest.raises(KeyError, match="rank 1"):
        on_threads(2, work)


def test_ranks_that_sum_different_shapes_are_told() -> None:
    with pytest.raises(ValueError, match=r"\[\(1,\), \(2,\)\]"):
        on_threads(2, lambda group: group.all_reduce(torch.ones(group.rank + 1)))


@on_ranks(2)
def test_processes_do_as_threads_do(rank: RankContext) -> None:
    process_group = dist.new_group([0, 1])
    group = ProcessTensorGroup(process_group)
    x = torch.ones(2, requires_grad=True)
    y = reduce_from(copy_to(x, group) * (rank.rank + 1), group)
    y.backward(torch.tensor([1.0, 10.0]))

    assert x.grad is not None
    assert (y.tolist(), x.grad.tolist()) == ([3.0, 3.0], [3.0, 30.0])
    assert group.reduced_bytes == 2 * 8
    both = group.all_gather(torch.full((3,), float(rank.rank)))
    mine = group.reduce_scatter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank.rank + 1))
    assert (both.tolist(), mine.tolist()) == ([[0.0] * 3, [1.0] * 3], [[3.0, 6.0], [9.0, 12.0]][rank.rank])
    assert (group.gathered_bytes, group.scattered_bytes) == (2 * 3 * 4, 2 * 2 * 4)
    dist.destroy_process_group(process_group)


class _InPlace:
    """A group that sums in place, as processes do."""

    def __init__(self, group: ThreadGroup) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self._group.all_reduce(tensor))


def test_wholes_and_parts_may_be_written_into() -> None:
    def work(group: ThreadGroup) -> tuple[list[float], list[float]]:
        own: TensorGroup = _InPlace(group)  # type: ignore[assignment]
        x = torch.ones(4, requires_grad=True)
        y = gather_from(scatter_to(x * 1, HALVES, own).mul_(2), HALVES, own).mul_(3)
        y.sum().backward()
        assert x.grad is not None
        return y.tolist(), x.grad.tolist()

    assert on_threads(2, work) == [([6.0] * 4, [6.0] * 4)] * 2
