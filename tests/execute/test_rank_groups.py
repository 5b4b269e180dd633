"""Who sums a gradient, and what its bytes are called."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn as nn

from shardwise.comm.traffic import Traffic
from shardwise.execute.place import Place
from shardwise.execute.rank_groups import Kind, gradient_sum
from shardwise.launch import RankContext
from shardwise.testing import on_ranks


def kind(*positions: int, partial: bool = False, divides_experts: bool = False) -> Kind:
    return Kind(positions=positions, partial=partial, divides_experts=divides_experts)


@pytest.mark.parametrize(
    "of, axis", [(kind(1), "dp.all_reduce"), (kind(0, 1), "pp.all_reduce"), (kind(0, 1, partial=True), "tp.gradients")]
)
def test_bytes_are_called_by_the_axis_that_makes_them_needed(of: Kind, axis: str) -> None:
    assert of.axis == axis


@on_ranks(4)
def test_a_gradient_is_summed_over_all_that_have_a_share_of_it_and_nobody_else(rank: RankContext) -> None:
    place = Place(rank=rank.rank, dp=2, pp=1, tp=2, ep=2)  # replica, shard: 0 = (0, 0), 1 = (0, 1), 2 = (1, 0) ...
    kinds = {
        "weight": kind(0),
        "norm": kind(0, partial=True),
        "expert": kind(0, divides_experts=True),
        "expert_norm": kind(0, partial=True, divides_experts=True),
    }
    held = {name: nn.Parameter(torch.zeros(3)) for name in kinds}
    traffic = Traffic()
    with contextlib.ExitStack() as stack:
        gradients = gradient_sum(place, held, kinds, dict.fromkeys(kinds, (0,)), traffic, stack)
        assert gradients is not None
        for parameter in held.values():
            parameter.grad = torch.full((3,), 10.0**rank.rank)
        gradients.finish()
        gradients.close()
    sums = {name: float(parameter.grad[0]) for name, parameter in held.items() if parameter.grad is not None}
    r = rank.rank
    assert sums == {
        "weight": [101.0, 1010.0][r % 2],  # the same shard of both replicas
        "norm": 1111.0,
        "expert": 10.0**r,  # nobody else has it
        "expert_norm": [11.0, 1100.0][r // 2],  # both shards of the replica
    }
    one = 4 * (3 + 1)  # and a flag: whether there is a gradient
    assert traffic.read() == {"dp.all_reduce": one, "tp.gradients": 2 * one}


@on_ranks(2)
def test_what_has_one_holder_is_summed_by_nobody(rank: RankContext) -> None:
    place = Place(rank=rank.rank, dp=1, pp=2)
    held = {f"of stage {rank.rank}": nn.Parameter(torch.zeros(3))}
    kinds = {f"of stage {stage}": kind(stage) for stage in range(2)}
    with contextlib.ExitStack() as stack:
        holders = {name: of.positions for name, of in kinds.items()}
        assert gradient_sum(place, held, kinds, holders, Traffic(), stack) is None
