"""State-space blocks are divided by heads; what all heads share stays whole on every rank."""

from __future__ import annotations

import pytest
import torch

from parallel.tensor.blocks import Model
from parallel.tensor.state_space import StateSpace
from shardwise.parallel.tensor.plan_tensor import plan_tensor

X = (torch.randn(2, 5, 16, requires_grad=True),)
INNER, STATE, HEADS = 32, 6, 4


def test_heads_are_divided_and_the_states_that_they_share_are_on_every_rank() -> None:
    plan = plan_tensor(Model(StateSpace(), StateSpace()), X, tp=2)
    unit = plan.units["blocks.0"]

    shared = (2 * INNER, 2 * INNER + 2 * STATE)  # B and C, behind z and x; dt behind them
    assert plan.sharded_share == 1.0
    assert unit.slices["mixer.in_proj.weight"].ranges[0] == ((0, 16), (32, 48), (shared[0], shared[1] + HEADS // 2))
    assert unit.slices["mixer.conv.weight"].ranges[1] == ((16, 44),)
    assert unit.slices["mixer.in_proj.weight"].shared == (shared,)
    assert unit.attributes["mixer", "conv_dim"] == (28, 28)
    assert unit.attributes["mixer.conv", "groups"] == (28, 28)
    assert "mixer.norm" in unit.gathers


@pytest.mark.parametrize(("groups", "tp"), [(2, 2), (2, 4), (1, 4)])
def test_groups_of_states_follow_their_heads(groups: int, tp: int) -> None:
    plan = plan_tensor(Model(StateSpace(groups=groups)), X, tp=tp)

    assert plan.sharded_share == 1.0
    assert not plan.units["blocks.0"].alone
    assert plan.units["blocks.0"].slices["mixer.a_log"].local_size(0) == HEADS // tp
