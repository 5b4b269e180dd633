"""Bytes of a step by hand: exchanges of every micro-batch, messages there and back, sums with a flag a parameter."""

from __future__ import annotations

import dataclasses

import pytest

from plan.hand_runs import SENT, works
from shardwise.describe.kernels import Exchange, ExchangeKind, Phase
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.step_traffic import SummedParameter, traffic_of_step

JOB = Job(global_batch=8)
FIRST, LAST = SummedParameter(100, [0]), SummedParameter(60, [1])
TIED = SummedParameter(1000, [0, 1])


def sent(
    layout: Layout, *parameters: SummedParameter, stages: object = ((0,), (1,)), mapped: bool = False
) -> list[object]:
    return list(
        traffic_of_step(works(), stages, parameters, layout, JOB, num_micro_batches=4, mapped=mapped)  # type: ignore[arg-type]
    )


def test_a_stage_sends_activations_and_the_next_one_their_gradients() -> None:
    assert sent(Layout(pp=2)) == [{"pp.send": int(4 * SENT)}, {"pp.send": int(4 * SENT)}]


def test_two_stages_of_one_rank_send_each_other_nothing() -> None:
    assert sent(Layout(pp=1), stages=((0, 1),)) == [{}]


def test_replicas_sum_what_a_place_holds_and_a_flag_for_each_parameter() -> None:
    first, last = sent(Layout(pp=2, dp=3), FIRST, LAST)
    assert first["dp.all_reduce"] == 4 * 101
    assert last["dp.all_reduce"] == 4 * 61


def test_stages_that_share_a_parameter_sum_it_and_shards_sum_partial_gradients() -> None:
    first, last = sent(Layout(pp=2), FIRST, LAST, TIED)
    assert first["pp.all_reduce"] == last["pp.all_reduce"] == 4 * 1001
    assert "dp.all_reduce" not in first
    partial = SummedParameter(30, [0], partial=True)
    assert sent(Layout(pp=2, tp=2), partial)[0]["tp.gradients"] == 4 * 31


def test_experts_have_a_copy_for_every_group_of_ranks_that_divide_them() -> None:
    expert = SummedParameter(500, [0], expert=True)
    assert "dp.all_reduce" not in sent(Layout(pp=2, ep=2), expert)[0]
    assert sent(Layout(pp=2, ep=2, dp=2), expert)[0]["dp.all_reduce"] == 4 * 501


@pytest.mark.parametrize(("zero", "scattered", "gathered"), [(1, 1, 1), (2, 4, 1), (3, 4, 8)])
def test_divided_state_is_scattered_and_gathered(zero: int, scattered: int, gathered: int) -> None:
    layout = Layout(pp=2, fsdp=2, zero=zero, micro_batches=4)
    first, _ = sent(layout, FIRST)
    if layout.unshards_by_step:
        scattered, gathered = 1, 1
    assert first["fsdp.reduce_scatter"] == 400 * scattered
    assert first["fsdp.all_gather"] == 400 * gathered
    assert sent(layout, FIRST, mapped=True)[0].get("fsdp.all_gather", 0) == 0


def test_exchanges_inside_units_are_those_of_all_micro_batches() -> None:
    exchange = Exchange(kind=ExchangeKind.ALL_REDUCE, axis="tp", phase=Phase.FORWARD, nbytes=10, count=3)
    divided = [dataclasses.replace(work, exchanges=(exchange,)) for work in works()]
    (first, _) = traffic_of_step(divided, ((0,), (1,)), (), Layout(pp=2, tp=2), JOB, num_micro_batches=4)
    assert first["tp.all_reduce"] == 10 * 3 * 4
