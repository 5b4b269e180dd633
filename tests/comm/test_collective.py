"""Sums, scattered sums and gathers of a group: right, counted, and whatever the backend's own are."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from shardwise.comm.collective import Collective, ProcessGroupCollective, moved_bytes
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def check_collective(group: Collective, numel: int, dtype: torch.dtype, *, own: bool = True) -> None:
    """Every operation on whole numbers, whose sums are exact in any order. `own`: in memory of the collective."""
    values = [
        torch.randint(-8, 8, (numel,), generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(group.size)
    ]
    total, part = sum(values[1:], start=values[0]), numel // group.size
    mine = slice(group.rank * part, (group.rank + 1) * part)
    flat = group.empty(numel, dtype) if own else torch.empty(numel, dtype=dtype)

    flat.copy_(values[group.rank])
    group.all_reduce(flat).wait()
    assert torch.equal(flat, total)

    flat.copy_(values[group.rank])
    out = torch.empty(part, dtype=dtype)
    group.reduce_scatter(flat, out).wait()
    assert torch.equal(out, total[mine])

    flat.copy_(values[group.rank])
    group.reduce_scatter(flat, flat[mine]).wait()
    assert torch.equal(flat[mine], total[mine])

    group.all_gather(out, flat).wait()
    assert torch.equal(flat, total)

    everybody = torch.empty_like(flat)
    flat.copy_(values[group.rank])
    group.all_to_all(flat, everybody).wait()
    assert torch.equal(everybody.view(group.size, -1), torch.stack(values)[:, mine])

    flat.zero_()
    flat[mine] = total[mine]
    group.all_gather(flat[mine], flat).wait()
    assert torch.equal(flat, total)


@on_ranks(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ranks_of_gloo(rank: RankContext, dtype: torch.dtype) -> None:
    group = dist.new_group([0, 1])
    check_collective(ProcessGroupCollective(group), 6, dtype)
    dist.destroy_process_group(group)


@on_ranks(3)
def test_three_ranks_in_an_order_of_their_own(rank: RankContext) -> None:
    group = dist.new_group([2, 0, 1])
    check_collective(ProcessGroupCollective(group), 3 * 70_000, torch.float32)
    dist.destroy_process_group(group)


@on_ranks(4)
def test_groups_of_two_beside_each_other_count_what_they_sent(rank: RankContext) -> None:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = ProcessGroupCollective(groups[rank.rank % 2])
    check_collective(own, 8, torch.float32)
    assert dict(own.sent_bytes) == {"all_reduce": 32, "reduce_scatter": 64, "all_gather": 64, "all_to_all": 32}
    assert moved_bytes(own.sent_bytes, 2) == 32 + 32 + 32 + 16
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def test_a_rank_alone_moves_nothing() -> None:
    assert moved_bytes({"all_reduce": 100, "all_gather": 10}, 1) == 0
