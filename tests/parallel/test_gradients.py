"""Sums of gradients over replicas and over stages that share a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.collective import ProcessGroupCollective
from shardwise.errors import DataflowError
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
    over = ProcessGroupCollective(group)
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, over), bucket_bytes=20)

    sums.begin([0])
    with sums.during(0):
        loss_of(parameters, rank.rank).backward()
    assert over.sent_bytes.get("all_reduce", 0) > 0  # while the backward ran
    sums.end(0)
    sums.finish()

    assert [parameter.grad.tolist() for parameter in parameters.values()] == [[3.0] * 4, [4.0] * 4, [2.0] * 4]
    sums.close()
    dist.destroy_process_group(group)


@on_ranks(2)
def test_earlier_micro_batches_accumulate_and_are_summed_once(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    over = ProcessGroupCollective(group)
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, over))

    sums.begin([0])
    loss_of(parameters, rank.rank).backward()
    assert over.sent_bytes.get("all_reduce", 0) == 0
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
    over = ProcessGroupCollective(group)
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, over))

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
    over = {
        group: ProcessGroupCollective(group) for group in (tied, own) if group is not dist.GroupMember.NON_GROUP_MEMBER
    }
    groups = {name: over[own if name == "own" else tied] for name in held}
    sums = GradientSum(parameters, groups)

    sums.begin([0])
    torch.stack([parameter.sum() for parameter in parameters.values()]).sum().backward()
    sums.finish()

    assert all(parameter.grad is not None and parameter.grad[0] == 2.0 for parameter in parameters.values())
    sums.close()
    for group in (tied, own):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


@on_ranks(2)
def test_a_parameter_of_two_stages_is_final_behind_both_in_whatever_order_they_end(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    over = ProcessGroupCollective(group)
    parameters = three()
    stages = {"a": (0,), "b": (0, 2), "c": (2,)}
    sums = GradientSum(parameters, dict.fromkeys(parameters, over), stages=stages, own=(0, 2))
    size = 4 * (4 + 1)  # bytes of a parameter, and its flag

    def backward(stage: int) -> None:
        torch.stack([2 * parameters[name].sum() for name, own in stages.items() if stage in own]).sum().backward()

    for order in ((2, 0), (0, 2)):
        before = over.sent_bytes.get("all_reduce", 0)
        sums.begin(order)
        with sums.during(order[0]):  # gradients of b are not final, though autograd accumulates one
            backward(order[0])
        sums.end(order[0])
        assert over.sent_bytes.get("all_reduce", 0) - before == size  # a or c alone
        with sums.during(order[1]):
            backward(order[1])
        sums.end(order[1])
        assert over.sent_bytes.get("all_reduce", 0) - before == 3 * size
        sums.finish()
        assert parameters["b"].grad.tolist() == [8.0] * 4
        for parameter in parameters.values():
            parameter.grad = None
    sums.close()
    dist.destroy_process_group(group)


@on_ranks(2)
def test_what_waits_in_a_queue_is_final_when_it_is_said_and_buckets_keep_their_order(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    over = ProcessGroupCollective(group)
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, over), bucket_bytes=1)  # c, b, a: a bucket each
    size = 4 * (4 + 1)
    sums.begin([0])
    loss_of(parameters, rank.rank).backward()
    sums.final(parameters["c"])  # the stage has not ended: more may come
    assert over.sent_bytes.get("all_reduce", 0) == 0
    sums.end(0, but={id(parameters["c"]), id(parameters["a"])})
    assert over.sent_bytes.get("all_reduce", 0) == 0  # b is final and waits for c, as it does on every rank
    sums.final(parameters["c"])
    assert over.sent_bytes.get("all_reduce", 0) == 2 * size
    sums.final(parameters["a"])
    assert over.sent_bytes.get("all_reduce", 0) == 3 * size
    sums.finish()
    assert [parameter.grad[0].item() for parameter in parameters.values()] == [3.0, 4.0, 2.0]
    sums.close()
    dist.destroy_process_group(group)


@on_ranks(2)
def test_weights_of_several_places_of_the_pipeline_come_last_on_all_of_them(rank: RankContext) -> None:
    #   rank 0 has stages 0 and 3, rank 1 has 1 and 2; x is held by 0 and 2, y by 1 and 3
    group = dist.new_group([0, 1])
    over = ProcessGroupCollective(group)
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("x", "y")}
    stages, own = {"x": (0, 2), "y": (1, 3)}, ((0, 3), (2, 1))[rank.rank]
    sums = GradientSum(parameters, dict.fromkeys(parameters, over), stages=stages, own=own)
    for order in (own, own[::-1]):  # rank 0 ends x first and rank 1 y first, or the other way round
        sums.begin(order)
        (parameters["x"] * 2 + parameters["y"] * 3 * (rank.rank + 1)).sum().backward()
        for stage in order:
            sums.end(stage)
        sums.finish()
        assert [parameter.grad.tolist() for parameter in parameters.values()] == [[4.0] * 2, [9.0] * 2]
        for parameter in parameters.values():
            parameter.grad = None
    sums.close()
    dist.destroy_process_group(group)


class Nested(torch.autograd.Function):
    """Its backward calls `backward`, as checkpoints of one's own do."""

    @staticmethod
    def forward(ctx: Any, parameter: nn.Parameter, x: torch.Tensor) -> torch.Tensor:
        ctx.parameter = parameter
        return (parameter.detach() * x).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        with torch.enable_grad():
            inner = ctx.parameter.sum()
        torch.autograd.backward(inner, gradients[0])
        return None, torch.ones(4)


@on_ranks(2)
def test_a_gradient_of_a_backward_inside_the_backward_is_not_final(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    over = ProcessGroupCollective(group)
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, over), bucket_bytes=1)
    sums.begin([0])
    x = torch.ones(4, requires_grad=True)
    twice = [Nested.apply(parameters["c"], x) for _ in range(2)]  # type: ignore[no-untyped-call]
    loss = torch.stack(twice).sum() + parameters["b"].sum()
    with sums.during(0) as begins:
        loss.register_hook(begins)  # type: ignore[no-untyped-call]
        loss.backward()
    sums.end(0)
    sums.finish()
    assert parameters["c"].grad is not None
    assert parameters["c"].grad.tolist() == [4.0] * 4
    sums.close()
    dist.destroy_process_group(group)


@on_ranks(2)
def test_a_gradient_that_comes_behind_its_sum_is_an_error(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    over = ProcessGroupCollective(group)
    parameters = three()
    sums = GradientSum(parameters, dict.fromkeys(parameters, over))
    sums.begin([0])
    loss_of(parameters, rank.rank).backward()
    sums.end(0)
    loss_of(parameters, rank.rank).backward()
    with pytest.raises(DataflowError, match="was added to afterwards"):
        sums.finish()
    sums.close()
    dist.destroy_process_group(group)


@on_ranks(2)
def test_a_gradient_computed_where_it_travels_from_is_not_copied_and_memory_is_used_again(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    sums = GradientSum({"w": (weight := nn.Parameter(torch.zeros(3)))}, {"w": ProcessGroupCollective(group)})
    kept, addresses = [], []
    for step in range(4):
        assert sums.home(weight) is None
        weight.grad = None
        sums.begin([0])
        place = sums.home(weight)
        assert place is not None
        weight.grad = place.fill_(float(step + rank.rank))
        addresses.append(place.data_ptr())
        del place
        sums.end(0)
        assert sums.home(weight) is None  # it is on its way
        sums.finish()
        assert weight.grad.tolist() == [2.0 * step + 1] * 3
        assert weight.grad.data_ptr() == addresses[-1]
        if step == 1:
            kept.append(weight.grad)
    assert addresses[0] == addresses[1] != addresses[2] == addresses[3]  # what was kept is not written into
    assert kept[0].tolist() == [3.0] * 3
    sums.close()
    dist.destroy_process_group(group)
