"""Rings, trees and two levels: the sums of everybody, on two to six ranks, wherever their hosts are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from shardwise.comm.collective_over import collective_over
from shardwise.comm.hierarchical import HierarchicalCollective
from shardwise.comm.ring import RingCollective, TreeCollective
from shardwise.comm.shared_collective import SharedMemoryCollective
from shardwise.errors import LayoutError
from shardwise.launch import RankContext
from shardwise.testing import on_ranks
from tests.comm.test_collective import check_collective


def check_algorithm(
    rank: RankContext, algorithm: str, kind: type, hosts: Sequence[str], order: Sequence[int] = ()
) -> None:
    with contextlib.ExitStack() as stack:
        group = collective_over(
            [order or range(rank.world_size)], stack=stack, algorithm=algorithm, host=hosts[rank.rank]
        )
        assert type(group) is kind
        for part in (1, 7, 1000):
            check_collective(group, part * rank.world_size, torch.float32)
        for numel in (1, 5, 64):  # sums of any length
            flat = torch.arange(float(numel)) + rank.rank
            group.all_reduce(flat).wait()
            everybody = range(rank.world_size)
            assert torch.equal(flat, torch.arange(float(numel)) * len(everybody) + sum(everybody))
        same_bits(group.size, group)
        works = [(group.all_reduce(flat), flat) for flat in [torch.ones(10 + i) for i in range(5)]]
        for work, flat in works:  # several under way, waited for in their order
            work.wait()
            assert flat.eq(float(rank.world_size)).all()
        dist.barrier()


def same_bits(size: int, group: RingCollective) -> None:
    flat = torch.randn(333, generator=torch.Generator().manual_seed(group.rank)) * 10.0**group.rank
    group.all_reduce(flat).wait()
    everybody = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(everybody, flat)
    assert all(torch.equal(each, flat) for each in everybody)


@on_ranks(2)
@pytest.mark.parametrize("algorithm, kind", [("ring", RingCollective), ("tree", TreeCollective)])
def test_two_ranks(rank: RankContext, algorithm: str, kind: type) -> None:
    check_algorithm(rank, algorithm, kind, "ab")


@on_ranks(3)
@pytest.mark.parametrize("algorithm, kind", [("ring", RingCollective), ("tree", TreeCollective)])
def test_three_ranks_in_an_order_of_their_own(rank: RankContext, algorithm: str, kind: type) -> None:
    check_algorithm(rank, algorithm, kind, "abc", [1, 2, 0])


@on_ranks(4)
@pytest.mark.parametrize("hosts", ["aabb", "abab"])
def test_two_hosts_of_two(rank: RankContext, hosts: str) -> None:
    check_algorithm(rank, "hierarchical", HierarchicalCollective, hosts)


@on_ranks(6)
@pytest.mark.parametrize(
    "algorithm, kind, hosts",
    [
        ("ring", RingCollective, "aaaaaa"),
        ("tree", TreeCollective, "aaaaaa"),
        ("hierarchical", HierarchicalCollective, "aabcbc"),
        ("hierarchical", HierarchicalCollective, "aaabbb"),
    ],
)
def test_six_ranks(rank: RankContext, algorithm: str, kind: type, hosts: str) -> None:
    check_algorithm(rank, algorithm, kind, hosts, [5, 1, 3, 0, 2, 4])


@on_ranks(2)
def test_one_host_is_one_level(rank: RankContext) -> None:
    check_algorithm(rank, "hierarchical", SharedMemoryCollective, "aa")


@on_ranks(3)
def test_hosts_with_different_numbers_of_ranks_are_refused(rank: RankContext) -> None:
    with contextlib.ExitStack() as stack, pytest.raises(LayoutError, match="as many ranks of a group on every host"):
        collective_over([range(3)], stack=stack, algorithm="hierarchical", host="aab"[rank.rank])
