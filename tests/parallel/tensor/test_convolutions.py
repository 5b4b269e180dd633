"""Convolutions are divided by channels: pairs across BatchNorm, groups and squeezes; lone ones by themselves."""

from __future__ import annotations

import torch
import torch.nn as nn

from parallel.tensor.blocks import Model
from parallel.tensor.convolutions import Bottleneck, Inverted, Next
from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.plan_tensor import plan_tensor

X = (torch.randn(4, 16, 6, 6, requires_grad=True),)


def unit_plan(block: nn.Module, tp: int = 2) -> tuple[UnitPlan, float]:
    plan = plan_tensor(Model(block), X, tp=tp)
    return plan.units["blocks.0"], plan.sharded_share


def test_a_bottleneck_is_a_pair_and_a_convolution_by_itself() -> None:
    unit, share = unit_plan(Bottleneck())

    assert share == 1.0
    assert (unit.reduces, list(unit.alone)) == (("second",), ["third"])
    assert unit.slices["norm1.running_var"] == Slice.even(0, 8, 2)  # statistics of a channel are its own
    assert "norm3.weight" not in unit.slices


def test_groups_of_channels_stay_together() -> None:
    unit, share = unit_plan(Bottleneck(groups=4))

    assert share == 1.0
    assert (unit.copies, unit.reduces) == (("first",), ("third",))
    assert unit.attributes["second", "groups"] == (2, 2)
    assert unit.slices["second.weight"] == Slice.even(0, 8, 2)


def test_a_group_of_channels_is_not_torn() -> None:
    unit, _ = unit_plan(Bottleneck(inner=12, groups=3))

    assert "second.weight" not in unit.slices
    assert not unit.reduces


def test_depthwise_convolutions_follow_the_channels_around_them() -> None:
    unit, share = unit_plan(Inverted(), tp=4)

    assert share == 1.0
    assert (unit.copies, unit.reduces) == (("expand",), ("project",))
    assert unit.attributes["depthwise", "groups"] == (8,) * 4


def test_a_squeeze_over_all_channels_is_a_pair_of_its_own() -> None:
    unit, share = unit_plan(Inverted(squeeze=True))

    assert share == 1.0
    assert "squeeze.reduce" in unit.reduces
    assert "squeeze.expand" in {*unit.copies, *unit.alone}


def test_channels_that_a_norm_mixes_are_joined_in_front_of_it() -> None:
    unit, share = unit_plan(Next())

    assert share == 1.0
    assert (unit.copies, unit.reduces) == (("up",), ("down",))
    assert list(unit.alone) == ["depthwise"]
    assert unit.cuts["depthwise"] == Slice.even(-3, 16, 2)
