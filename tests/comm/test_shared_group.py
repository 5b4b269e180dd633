"""Sums of a unit's ranks in mapped memory: the same as by messages, in every shape."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist

from shardwise.comm.collective_over import collective_over
from shardwise.comm.same_host import same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.comm.shared_group import SharedGroup
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

SHAPES = [(0,), (3,), (5, 7), (300, 200), (700, 1000)]


@on_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_both_ways_are_equal(rank: RankContext, dtype: torch.dtype) -> None:
    with contextlib.ExitStack() as stack:
        transport = stack.enter_context(same_host_transport(range(3)))
        collective = collective_over([[2, 0, 1]], stack=stack)
        assert collective is not None
        ours = SharedGroup(collective, transport, [2, 0, 1], rank.rank)
        other = SameHostGroup(transport, [2, 0, 1], rank.rank)
        for shape in SHAPES:
            value = (torch.randn(shape, generator=torch.Generator().manual_seed(rank.rank)) * 10).to(dtype)
            assert torch.equal(ours.all_reduce(value.clone()), other.all_reduce(value.clone()))
            assert torch.equal(ours.all_gather(value), other.all_gather(value))
            blocks = torch.stack([value, value + 1, value + 2])
            assert torch.equal(ours.reduce_scatter(blocks), other.reduce_scatter(blocks))
            assert torch.equal(ours.all_reduce_max(value.clone()), other.all_reduce_max(value.clone()))
        turned = torch.ones(4, 6).t()
        assert ours.all_reduce(turned) is turned
        assert turned.eq(3.0).all()
        counts = ("reduced_bytes", "gathered_bytes", "scattered_bytes")
        assert [getattr(ours, name) for name in counts[1:]] == [getattr(other, name) for name in counts[1:]]
        assert ours.reduced_bytes == other.reduced_bytes + turned.nbytes
        dist.barrier()
