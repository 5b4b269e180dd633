"""Sums over ranks of one host: right, the same bits on every rank, and in the order of the ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from shardwise.comm.same_host import same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

# one element, one more or less than a way or a chunk ends at, and parts of unequal length
SIZES = [0, 1, 3, 1000, 128 << 10, (128 << 10) + 1, (256 << 10) + 5, (2 << 20) + 1]


def check_sums(rank: RankContext, dtype: torch.dtype) -> None:
    with same_host_transport(range(rank.world_size)) as transport:
        group = SameHostGroup(transport, range(rank.world_size), rank.rank)
        assert (group.rank, group.size) == (rank.rank, rank.world_size)
        for size in SIZES:
            torch.manual_seed(size)
            values = [(torch.randn(size) * 100).to(dtype) for _ in range(rank.world_size)]
            expected = values[0].clone()
            for value in values[1:]:
                expected += value
            got = group.all_reduce(values[rank.rank])
            assert torch.equal(got, expected), (size, dtype)
        dist.barrier()


@on_ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_two_ranks_sum(rank: RankContext, dtype: torch.dtype) -> None:
    check_sums(rank, dtype)


@on_ranks(3)
def test_three_ranks_sum_in_the_order_of_the_ranks(rank: RankContext) -> None:
    check_sums(rank, torch.float32)


@on_ranks(4)
def test_four_ranks_sum_in_the_order_of_the_ranks(rank: RankContext) -> None:
    check_sums(rank, torch.bfloat16)


@on_ranks(3)
def test_what_one_rank_has_reaches_all_and_it_does_not_wait_for_them(rank: RankContext) -> None:
    with same_host_transport(range(3)) as transport:
        group = SameHostGroup(transport, [2, 0, 1], rank.rank)
        if rank.rank != 0:
            dist.barrier()
        for turn in range(3):
            got = group.broadcast(torch.full((4,), float(rank.rank + 10 * turn)), 1)
            assert got.tolist() == [10.0 * turn] * 4
        if rank.rank == 0:
            dist.barrier()  # the others come here before they receive anything
        dist.barrier()


@on_ranks(4)
def test_two_groups_share_a_transport(rank: RankContext) -> None:
    mine = [0, 2] if rank.rank in (0, 2) else [3, 1]
    with same_host_transport(range(4)) as transport:
        group = SameHostGroup(transport, mine, rank.rank)
        for _ in range(3):
            total = group.all_reduce(torch.full((2, 5), float(rank.rank)))
            assert total.tolist() == [[float(sum(mine))] * 5] * 2
        assert group.reduced_bytes == 3 * 40
        dist.barrier()


@on_ranks(2)
def test_what_the_tensor_reads_elsewhere_stays(rank: RankContext) -> None:
    whole = torch.ones(10)
    with same_host_transport([0, 1]) as transport:
        SameHostGroup(transport, [0, 1], rank.rank).all_reduce(whole[2:4])
        dist.barrier()
    assert whole.tolist() == [1, 1, 2, 2, 1, 1, 1, 1, 1, 1]


@on_ranks(3)
def test_the_largest_elements_reach_every_rank(rank: RankContext) -> None:
    values = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, float("nan")], [-1.0, 7.0, 1.0]])
    with same_host_transport(range(3)) as transport:
        got = SameHostGroup(transport, range(3), rank.rank).all_reduce_max(values[rank.rank].clone())
        dist.barrier()
    assert got[:2].tolist() == [3.0, 7.0]
    assert got[2].isnan()


@on_ranks(3)
@pytest.mark.parametrize("size", [1, 1000, 700_001])  # the last in several chunks
def test_blocks_are_gathered_in_order_and_each_rank_gets_the_sum_of_its_own(rank: RankContext, size: int) -> None:
    torch.manual_seed(size)
    given = torch.randn(3, 3, size)  # (of rank, for rank, elements)
    kept = given.clone()
    with same_host_transport(range(3)) as transport:
        group = SameHostGroup(transport, range(3), rank.rank)
        everything = group.all_gather(given[rank.rank])
        mine = group.reduce_scatter(given[rank.rank])
        dist.barrier()
    assert torch.equal(everything, kept)
    assert torch.equal(mine, kept[0, rank.rank] + kept[1, rank.rank] + kept[2, rank.rank])
    assert torch.equal(given, kept)
    assert (group.gathered_bytes, group.scattered_bytes) == (given.nbytes, given[0].nbytes)


@on_ranks(2)
def test_a_permuted_tensor_keeps_its_strides(rank: RankContext) -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    with same_host_transport([0, 1]) as transport:
        got = SameHostGroup(transport, [0, 1], rank.rank).all_reduce(tensor)
        dist.barrier()
    assert got is tensor
    assert got.stride() == (1, 3)
    assert got.tolist() == [[0, 6], [2, 8], [4, 10]]
