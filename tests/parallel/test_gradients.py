"""Sums of gradients over replicas and over stages that share a parameter."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.launch import RankContext
from shardwise.parallel.gradients import GradientSum
from shardwise.testing import on_ranks


def three(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(4, generator=generator)) for name in ("a", "b", "c")}


def loss_of(parameters: dict[str, nn.Parameter], rank: int) -> torch.Tensor:
    return (parameters["a"] * (rank + 1) + parameters["b"] * 2 + parameters["c"]).sum()


@on_ranks(2)
def test_gradients_are_summed_in_buckets_during_the_backward(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, group), bucket_bytes=20)

    sums.begin([0])
    with sums.during(0):
        loss_of(parameters, rank.rank).backward()
    assert sums.reduced_bytes(group) > 0  # while the backward ran
    sums.end(0)
    sums.finish()

    assert [parameter.grad.tolist() for parameter in parameters.values()] == [[3.0] * 4, [4.0] * 4, [2.0] * 4]
    sums.close()
    dist.destroy_process_group(group)


@on_ranks(2)
def test_earlier_micro_batches_accumulate_and_are_summed_once(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, group))

    sums.begin([0])
    loss_of(parameters, rank.rank).backward()
    assert sums.reduced_bytes(group) == 0
    with sums.during(0):
        loss_of(parameters, rank.rank).backward()
    sums.end(0)
    sums.finish()

    assert parameters["a"].grad.tolist() == [6.0] * 4
    sums.close()
    dist.destroy_process_group(group)


@on_ranks(2)
def test_a_gradient_that_one_rank_lacks_counts_as_zero_and_one_that_all_lack_stays_none(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, group))

    sums.begin([0])
    (parameters["a"].sum() if rank.rank == 0 else parameters["b"].sum()).backward()
    sums.finish()

    assert parameters["a"].grad.tolist() == [1.0] * 4
    assert parameters["b"].grad.tolist() == [1.0] * 4
    assert parameters["c"].grad is None
    sums.close()
    dist.destroy_process_group(group)


@on_ranks(3)
def test_members_of_a_group_agree_on_its_buckets_whatever_else_they_hold(rank: RankContext) -> None:
    #   rank 0 holds a, own, b      rank 1 holds a, b      rank 2 holds own
    #   the group {0, 1} shares a and b, the group {0, 2} shares own
    tied = dist.new_group([0, 1])
    own = dist.new_group([0, 2])
    every = {"a": nn.Parameter(torch.ones(4)), "own": nn.Parameter(torch.ones(4)), "b": nn.Parameter(torch.ones(2))}
    held = {0: ("a", "own", "b"), 1: ("a", "b"), 2: ("own",)}[rank.rank]
    parameters = {name: every[name] for name in held}
    groups = {name: own if name == "own" else tied for name in held}
    sums = GradientSum(parameters, groups)  # type: ignore[arg-type]

    sums.begin([0])
    torch.stack([parameter.sum() for parameter in parameters.values()]).sum().backward()
    sums.finish()

    assert all(parameter.grad is not None and parameter.grad[0] == 2.0 for parameter in parameters.values())
    sums.close()
    for group in (tied, own):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
