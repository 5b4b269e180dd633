"""Ranks that map each other's memory: the same sums as everywhere, from any memory, and errors where a rank is gone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.comm.collective import Collective
from shardwise.comm.collective_over import collective_over
from shardwise.comm.shared_collective import SharedMemoryCollective
from shardwise.errors import TransferError
from shardwise.launch import RankContext
from shardwise.testing import on_ranks
from tests.comm.test_collective import check_collective

# one part each, one path and the next, more than a stage, more than all stages
SIZES = [1, 1000, 11_000, 50_000, 90_001, 700_000, 1_500_000]


def all_of(rank: RankContext, stack: contextlib.ExitStack) -> SharedMemoryCollective:
    made = collective_over([range(rank.world_size)], stack=stack)
    assert isinstance(made, SharedMemoryCollective)
    return made


def check_sizes(rank: RankContext, dtype: torch.dtype) -> None:
    with contextlib.ExitStack() as stack:
        group = all_of(rank, stack)
        for part in SIZES:
            for own in (True, False):
                check_collective(group, part * rank.world_size, dtype, own=own)


@on_ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks(rank: RankContext, dtype: torch.dtype) -> None:
    check_sizes(rank, dtype)


@on_ranks(3)
def test_three_ranks(rank: RankContext) -> None:
    check_sizes(rank, torch.float64)


@on_ranks(4)
def test_four_ranks(rank: RankContext) -> None:
    check_sizes(rank, torch.float32)


@on_ranks(3)
@pytest.mark.parametrize("numel", [300, 300_000])
@pytest.mark.parametrize("own", [True, False])
def test_sums_have_the_order_of_the_ranks(rank: RankContext, numel: int, own: bool) -> None:
    values = [torch.randn(numel, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with contextlib.ExitStack() as stack:
        group = collective_over([[2, 0, 1]], stack=stack)
        assert isinstance(group, SharedMemoryCollective)
        flat = group.empty(numel, torch.float32) if own else torch.empty(numel)
        group.all_reduce(flat.copy_(values[rank.rank])).wait()
        assert torch.equal(flat, values[2] + values[0] + values[1])
        dist.barrier()


@on_ranks(4)
def test_groups_beside_each_other(rank: RankContext) -> None:
    with contextlib.ExitStack() as stack:
        group = collective_over([[0, 2], [3, 1]], stack=stack)
        assert isinstance(group, SharedMemoryCollective)
        for _ in range(3):
            check_collective(group, 4000, torch.float32)
        dist.barrier()


@on_ranks(3)
def test_who_is_in_no_group_has_none(rank: RankContext) -> None:
    with contextlib.ExitStack() as stack:
        group = collective_over([[0, 2]], stack=stack)
        assert (group is None) == (rank.rank == 1)
        if group is not None:
            check_collective(group, 400_000, torch.float32)
        dist.barrier()


def summed(group: Collective, numel: int, step: int) -> torch.Tensor:
    flat = group.empty(numel, torch.float32).fill_(step * (group.rank + 1))
    group.all_reduce(flat).wait()
    return flat


@on_ranks(2)
def test_a_call_begins_without_the_others_and_is_done_by_the_next_one(rank: RankContext) -> None:
    with contextlib.ExitStack() as stack:
        group = all_of(rank, stack)
        flats = [group.empty(100_000, torch.float32).fill_(i + rank.rank) for i in range(20)]
        if rank.rank == 1:
            dist.barrier()
        works = [group.all_reduce(flat) for flat in flats]
        if rank.rank == 0:
            assert torch.equal(flats[0], torch.zeros(100_000))  # the other one is not there
            dist.barrier()
        for i, (work, flat) in enumerate(zip(works, flats, strict=True)):
            work.wait()
            assert flat.eq(2.0 * i + 1).all()
        dist.barrier()


@on_ranks(2)
def test_more_calls_than_the_board_has_lines(rank: RankContext) -> None:
    with contextlib.ExitStack() as stack:
        group = all_of(rank, stack)
        small = [torch.full((3,), float(i)) for i in range(600)]
        for work in [group.all_reduce(each) for each in small]:
            work.wait()
        assert all(each.eq(2.0 * i).all() for i, each in enumerate(small))
        dist.barrier()


@on_ranks(2)
def test_many_regions_before_anybody_asks_for_one(rank: RankContext) -> None:
    """More than a socket holds: the rest is sent when there is room."""
    with contextlib.ExitStack() as stack:
        group = all_of(rank, stack)
        flats = [group.empty(40_000, torch.float32).fill_(1.0 + i) for i in range(500)]
        for i, flat in enumerate(flats):
            group.all_reduce(flat).wait()
            assert flat[0] == flat[-1] == 2.0 + 2 * i
        dist.barrier()


@on_ranks(2)
def test_a_rank_that_ended_is_an_error(rank: RankContext) -> None:
    with contextlib.ExitStack() as stack:
        group = all_of(rank, stack)
        assert summed(group, 50_000, 1).eq(3.0).all()
        if rank.rank == 1:
            group.close()  # as the kernel does for a process that ends
        else:
            with pytest.raises(RuntimeError, match=r"places \[1\].*ended"):
                summed(group, 50_000, 2)
        dist.barrier()


@on_ranks(2)
def test_ranks_that_call_different_things_are_told(rank: RankContext) -> None:
    with contextlib.ExitStack() as stack:
        group = all_of(rank, stack)
        with pytest.raises(TransferError, match="same order"):
            group.all_reduce(torch.ones(10 + 2 * rank.rank)).wait()
        dist.barrier()


@on_ranks(2)
def test_nothing_stays_open(rank: RankContext) -> None:
    def count() -> tuple[int, int]:
        mapped = Path("/proc/self/maps").read_text().count("memfd:shardwise")
        return len(os.listdir("/proc/self/fd")), mapped

    dist.barrier()
    before = count()
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            group = all_of(rank, stack)
            check_collective(group, 400_000, torch.float32)
            dist.barrier()
    del group
    assert count() == before
