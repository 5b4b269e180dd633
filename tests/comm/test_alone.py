"""A rank by itself: groups are there, nothing is waited for, and nothing arrives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from shardwise.comm.alone import AloneTransport, alone
from shardwise.comm.collective import ProcessGroupCollective
from shardwise.errors import LaunchError


def test_a_rank_of_a_large_world_has_groups_and_waits_for_nobody() -> None:
    with alone(rank=37, world_size=1024):
        assert (dist.get_rank(), dist.get_world_size()) == (37, 1024)
        group = dist.new_group(list(range(32, 40)))
        assert isinstance(group, dist.ProcessGroup)
        collective = ProcessGroupCollective(group)
        own, whole = torch.ones(3), torch.zeros(24)
        collective.all_reduce(own).wait()
        collective.all_gather(own, whole).wait()
        collective.reduce_scatter(whole, torch.empty(3)).wait()
        assert (collective.rank, collective.size) == (5, 8)
        assert collective.sent_bytes == {"all_reduce": 12, "all_gather": 96, "reduce_scatter": 96}
    assert not dist.is_initialized()


def test_messages_of_the_pipeline_leave_and_arrive_at_once() -> None:
    tensor = torch.arange(3.0)
    AloneTransport().isend(tensor, 1).wait()
    AloneTransport().irecv(tensor, 1).wait()
    assert tensor.tolist() == [0.0, 1.0, 2.0]


def test_a_process_that_has_a_group_is_not_alone() -> None:
    with (
        alone(rank=0, world_size=2),
        pytest.raises(LaunchError, match="is rank 0 of 2; start one process"),
        alone(rank=1, world_size=2),
    ):
        pass
