"""The text of a plan says what the numbers say, in at most 100 columns."""

from __future__ import annotations

import dataclasses

from hand_profiles import chain
from shardwise.describe.profile import ParameterProfile
from shardwise.layout import Layout
from shardwise.plan.cut import cut_stages
from shardwise.plan.estimate import estimate
from shardwise.plan.explain import explain
from shardwise.plan.partition import place


def explained(profile, layout, *, num_micro_batches=4, assumes=""):
    cut = cut_stages(profile.flow, place(profile, layout), layout.num_stages)
    found = estimate(profile, layout, cut, num_micro_batches=num_micro_batches, flops_per_s=1e6)
    return explain(profile, layout, cut, found, assumes=assumes)


def test_a_plan_reads() -> None:
    assert explained(chain([10**6] * 4), Layout(dp=2, pp=2), assumes="1 Mflops a second on every rank") == PLAN


PLAN = """\
model         Chain: 16 parameters, 64 B, in 4 units
              4 Mflops forward and 8 Mflops backward for the traced batch
layout        dp=2,pp=2: 2 replicas of 2 stages on 4 ranks; 1f1b with 4 micro-batches a replica

stage 0       ranks 0-1: 8 parameters, 528 B, 50% of the time (6 Mflops a micro-batch)
  runs        layers.0-1
  memory      parameters 32 B + gradients 32 B + optimizer 64 B + activations 400 B (2 in flight)
  sends       to stage 1: 32 B forward and 32 B back a micro-batch: layers.1 float32[8]

stage 1       ranks 2-3: 8 parameters, 360 B, 50% of the time (6 Mflops a micro-batch)
  runs        layers.2-3
  memory      parameters 32 B + gradients 32 B + optimizer 64 B + activations 232 B (1 in flight)

step          30 s predicted for forwards and backwards, 20% of it waiting; busiest stage 1.00 × the
              mean
  assumes     1 Mflops a second on every rank
  left out    averaging gradients (each rank sends 32 B at most), the optimizer, reading data
one replica, rank r of it is stage r:
rank 0  0>>>>>1>>>>>...........0<<<<<<<<<<<2>>>>>1<<<<<<<<<<<3>>>>>2<<<<<<<<<<......3<<<<<<<<<<<
rank 1  ......0>>>>>0<<<<<<<<<<1>>>>>1<<<<<<<<<<<2>>>>>2<<<<<<<<<<<3>>>>>3<<<<<<<<<<............

3> forward of micro-batch 3   3< backward of micro-batch 3   . idle"""


def test_a_unit_on_several_stages_is_shown_by_its_calls_and_its_shared_parameters() -> None:
    text = explained(chain([10**6] * 4, units=["layer"] * 4), Layout(pp=2))
    assert "in 1 unit called 4 times" in text
    assert "runs        layer#0-1" in text
    assert "shared        layer.weight, 16 B: on stages 0, 1; gradients are summed" in text


def test_parameters_that_no_stage_holds_are_named() -> None:
    spare = {"spare": ParameterProfile(shape=(3,), dtype="float32")}
    text = explained(dataclasses.replace(chain([10**6] * 2), glue_parameters=spare), Layout(pp=2))
    assert "unused        spare: not read by the forward, held by no stage" in text


def test_one_device_needs_no_drawing() -> None:
    text = explained(chain([10**6] * 2), Layout())
    assert "1 replica of 1 stage on 1 rank" in text
    assert "rank 0  " not in text


def test_no_line_is_longer_than_a_terminal() -> None:
    units = [f"a.module.path.that.goes.rather.deep.blocks.{i}.inner" for i in range(40)]
    text = explained(chain([10**6] * 40, units=units), Layout(dp=8, pp=12), num_micro_batches=24)
    assert max(map(len, text.splitlines())) <= 100
    assert all(unit in text for unit in units)


def test_a_plan_of_several_stages_a_rank_says_what_each_rank_holds() -> None:
    text = explained(chain([10**6] * 4), Layout(pp=2, schedule="zb-v"))
    assert "1 replica of 4 stages, 2 a rank, on 2 ranks; zb-v with 4 micro-batches" in " ".join(text.split())
    assert "stage 3       rank 0: 4 parameters" in text
    assert "rank 0        stages 0 and 3:" in text
    assert "rank 1        stages 1 and 2:" in text
    assert "busiest rank 1.00 × the mean" in " ".join(text.split())


def test_what_two_stages_of_a_rank_share_is_held_once() -> None:
    units = ["layers.0", "layers.1", "layers.2", "layers.0"]
    text = explained(chain([10**6] * 4, units=units), Layout(pp=2, schedule="zb-v"))
    assert "on stages 0, 3; stages of one rank, which holds them once" in text
    text = explained(chain([10**6] * 4, units=units), Layout(pp=2, schedule="interleaved"))
    assert "on stages 0, 3; gradients are summed" in text


def test_what_a_search_gained_is_told() -> None:
    profile, layout = chain([10**6] * 4), Layout(pp=2)
    cut = cut_stages(profile.flow, place(profile, layout), 2)
    found = estimate(profile, layout, cut, num_micro_batches=4, flops_per_s=1e6)
    assert "schedule      searched: 3 s predicted" in explain(
        profile, layout, cut, found, found="searched: 3 s predicted"
    )


def test_a_plan_says_what_replicas_divide_and_what_that_sends() -> None:
    whole, divided = (explained(chain([10**6] * 4), Layout(**layout)) for layout in ({"dp": 4}, {"dp": 2, "fsdp": 2}))
    assert "state" not in whole
    assert "parameters 64 B + gradients 64 B + optimizer 128 B" in whole
    text = " ".join(divided.split())
    assert "optimizer state, gradients and parameters divided by 2, parameters whole a unit at a time; 2 such" in text
    assert "parameters 64 B + gradients 64 B + optimizer 64 B" in text  # half, and two units of 16 B that are whole
    assert "averaging gradients and gathering parameters" in text
