"""Parameters of a bucket stay the same objects while the memory behind them comes and goes."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.collective import ProcessGroupCollective
from shardwise.comm.collective_over import collective_over
from shardwise.comm.shared_collective import SharedMemoryCollective
from shardwise.launch import RankContext
from shardwise.parallel.sharded.bucket import Bucket
from shardwise.parallel.sharded.buckets import Item, plan_buckets
from shardwise.parallel.sharded.gradients import GradientParts
from shardwise.parallel.sharded.residency import Residency
from shardwise.testing import on_ranks


def two(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": nn.Parameter(torch.randn(6, 5, generator=generator).to(dtype)),
        "b": nn.Parameter(torch.randn(6, generator=generator).to(dtype)),
    }


def buckets_of(parameters: dict[str, nn.Parameter], group: object, *, frees: bool, apart: bool = False) -> list[Bucket]:
    items = [
        Item(name=name, numel=p.numel(), itemsize=4, like=name if apart else "", units=frozenset({"u"}))
        for name, p in parameters.items()
    ]
    plans = plan_buckets(items, multiple=2)
    return [Bucket(plan, [parameters[n] for n in plan.names], group, frees=frees) for plan in plans]  # type: ignore[arg-type]


@on_ranks(2)
def test_what_autograd_saved_is_valid_again_when_a_freed_bucket_is_gathered(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    parameters = two()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    (bucket,) = buckets_of(parameters, ProcessGroupCollective(group), frees=True)
    assert not bucket.is_whole
    assert parameters["w"].untyped_storage().nbytes() == 0

    bucket.gather()
    bucket.wait()
    assert all(torch.equal(p.detach(), values[name]) for name, p in parameters.items())
    x = torch.randn(3, 5, requires_grad=True, generator=torch.Generator().manual_seed(1))
    y = torch.nn.functional.linear(x, parameters["w"], parameters["b"])
    bucket.free()
    bucket.gather()
    bucket.wait()
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, values["w"].sum(0).expand(3, 5))
    dist.destroy_process_group(group)


@on_ranks(2)
@pytest.mark.parametrize("frees", [False, True])
def test_an_update_of_the_own_parts_reaches_every_rank(rank: RankContext, frees: bool) -> None:
    group = dist.new_group([0, 1])
    parameters = two()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    (bucket,) = buckets_of(parameters, ProcessGroupCollective(group), frees=frees)
    with torch.no_grad():
        for state in bucket.states.values():
            state.parameter.add_(1.0)
    bucket.refresh()
    bucket.wait()
    bucket.gather()
    bucket.wait()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), values[name] + 1.0)
    dist.destroy_process_group(group)


@on_ranks(2)
@pytest.mark.parametrize("frees", [False, True])
def test_masters_are_divided_and_what_is_computed_with_is_their_rounding(rank: RankContext, frees: bool) -> None:
    group = dist.new_group([0, 1])
    masters = {name: p.detach().clone() for name, p in two().items()}
    parameters = two(torch.bfloat16)
    (plan,) = plan_buckets(
        [Item(name=n, numel=p.numel(), itemsize=2, like="", units=frozenset({"u"})) for n, p in parameters.items()],
        multiple=2,
    )
    bucket = Bucket(plan, list(parameters.values()), ProcessGroupCollective(group), frees=frees, masters=masters)
    with torch.no_grad():
        for state in bucket.states.values():
            assert state.parameter.dtype == torch.float32
            state.parameter.mul_(1.01)
    bucket.refresh()
    bucket.wait()
    bucket.gather()
    bucket.wait()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.detach(), (masters[name] * 1.01).bfloat16())
    dist.destroy_process_group(group)


@on_ranks(2)
def test_no_more_than_a_units_bucket_and_the_next_are_whole_at_a_time(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    parameters = {f"p{i}": nn.Parameter(torch.full((32,), float(i))) for i in range(4)}
    buckets = buckets_of(parameters, ProcessGroupCollective(group), frees=True, apart=True)
    residency = Residency(buckets)
    seen = []
    for bucket in [*buckets, *reversed(buckets)]:
        residency.turn([bucket], backward=len(seen) >= 4)
        assert bucket.is_whole
        seen.append("".join("#" if each.is_whole else "." for each in buckets))
    residency.rest()
    assert seen == ["##..", ".##.", "..##", "...#", "..##", ".##.", "##..", "#..."]
    assert not any(bucket.is_whole for bucket in buckets)
    dist.destroy_process_group(group)


def shared_bytes() -> int:
    """Of shared memory that this process has mapped in now."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssShmem"))


@on_ranks(2)
def test_on_one_host_the_parts_of_others_are_read_in_place_and_their_pages_given_back(rank: RankContext) -> None:
    with contextlib.ExitStack() as stack:
        group = collective_over([[0, 1]], stack=stack)
        assert isinstance(group, SharedMemoryCollective)
        numel = 2**20
        parameters = {"w": nn.Parameter(torch.arange(float(numel)))}
        (bucket,) = buckets_of(parameters, group, frees=True)
        group.barrier()
        at_rest = shared_bytes()
        bucket.gather()
        bucket.wait()
        assert torch.equal(parameters["w"].detach(), torch.arange(float(numel)))
        whole = shared_bytes()
        bucket.free()
        assert whole - at_rest >= 0.9 * 4 * numel / 2
        assert shared_bytes() - at_rest <= 0.1 * 4 * numel / 2
        group.barrier()
        (state,) = bucket.states.values()
        with torch.no_grad():
            state.parameter.add_(1.0)
        bucket.refresh()
        group.barrier()
        bucket.gather()
        assert torch.equal(parameters["w"].detach(), torch.arange(float(numel)) + 1.0)
        assert not any(group.sent_bytes[kind] for kind in ("all_gather", "reduce_scatter"))
        group.barrier()


def gradient_of(buckets: list[Bucket], name: str) -> torch.Tensor | None:
    found = [bucket.states[name].parameter.grad for bucket in buckets if name in bucket.states]
    return found[0] if found else None


@on_ranks(2)
def test_a_gradient_of_one_rank_alone_is_everyones_and_of_nobody_is_none(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    parameters = {name: nn.Parameter(torch.zeros(64)) for name in ("both", "one", "none")}
    buckets = buckets_of(parameters, ProcessGroupCollective(group), frees=False, apart=True)
    parts = GradientParts(buckets, [None] * 3)
    parts.begin([0])
    parameters["both"].grad = torch.full((64,), 1.0 + rank.rank)
    if rank.rank == 0:
        parameters["one"].grad = torch.arange(64.0)
    parts.end(0)
    parts.finish()
    assert gradient_of(buckets, "both").tolist() == [3.0] * 32
    assert gradient_of(buckets, "one").tolist() == list(map(float, range(32 * rank.rank, 32 * rank.rank + 32)))
    assert gradient_of(buckets, "none") is None
    dist.destroy_process_group(group)


@on_ranks(2)
def test_gradients_that_come_when_their_bucket_has_gone_are_reduced_at_the_end(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    parameters = two()
    buckets = buckets_of(parameters, ProcessGroupCollective(group), frees=False, apart=True)
    parts = GradientParts(buckets, [None, None])
    parts.begin([0])
    parameters["w"].grad = torch.ones(6, 5)
    parameters["b"].grad = torch.ones(6)
    with parts.during(0):
        parts.past(buckets)
    assert parameters["w"].grad is None  # on its way
    if rank.rank == 1:
        parameters["w"].grad = torch.ones(6, 5)
    parts.end(0)
    parts.finish()
    assert gradient_of(buckets, "w").tolist() == [3.0] * len(gradient_of(buckets, "w"))
    dist.destroy_process_group(group)


@on_ranks(2)
def test_reduced_behind_every_backward_the_parts_add_up(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    parameters = {"w": nn.Parameter(torch.zeros(64))}
    buckets = buckets_of(parameters, ProcessGroupCollective(group), frees=False)
    parts = GradientParts(buckets, [None], each=True)
    parts.begin([0])
    for micro_batch in range(3):
        parts.begin_backward(0)
        parameters["w"].grad = torch.full((64,), 10.0**micro_batch)
        parts.reduce_stage(0)
        assert parameters["w"].grad is None
    parts.end(0)
    parts.finish()
    assert gradient_of(buckets, "w").tolist() == [222.0] * 32
    dist.destroy_process_group(group)
