"""Numbers that choose (an expert, a row) take every value in a proof, so that no choice goes unproven."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.parallel.tensor.divided import Divided
from shardwise.parallel.tensor.instance import Call, random_copy
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers

EXPERTS = 3


class Experts(nn.Module):
    """Stacked experts, and one more that hands on what it is given: whole on every rank, so not to be summed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 16, 8) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, 8, 16) / 4)

    def forward(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        chosen = F.one_hot(choice, EXPERTS + 1)  # (tokens, 2, experts)
        out = x * chosen[..., EXPERTS].sum(-1, keepdim=True)
        for expert in range(EXPERTS):
            share = chosen[..., expert].sum(-1, keepdim=True)
            out = out + share * F.linear(F.relu(F.linear(x, self.up[expert])), self.down[expert])
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, EXPERTS + 1)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice: torch.Tensor = self.router(x).topk(2).indices
        out: torch.Tensor = self.experts(x, choice)
        return out


class Model(nn.Module):
    """The router and the experts are units of their own: what goes between them is a whole number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(x).square().mean()
        return out


def call(choice: torch.Tensor) -> Call:
    return Call(args=(torch.randn(20, 8), choice), kwargs={}, requires_grad=frozenset({0}), counted=frozenset({1}))


def test_every_number_that_the_unit_takes_is_given_and_those_of_a_row_are_different() -> None:
    (spread,) = with_whole_numbers(random_copy(Experts()), [call(torch.zeros(20, 2, dtype=torch.int64))])
    choice = spread.args[1]

    assert set(choice.flatten().tolist()) == set(range(EXPERTS + 1))
    assert bool((choice[:, 0] != choice[:, 1]).all())


def test_numbers_that_the_user_gave_stay() -> None:
    given = torch.ones(20, 2, dtype=torch.int64)
    known = Call(args=(torch.randn(20, 8), given), kwargs={}, requires_grad=frozenset({0}))
    (same,) = with_whole_numbers(random_copy(Experts()), [known])

    assert same.args[1] is given


@pytest.mark.parametrize("tp", [2])
def test_experts_of_which_one_hands_on_its_input_are_right_or_whole(tp: int) -> None:
    model, x = Model(), torch.randn(20, 8)
    plan = plan_tensor(model, (x,), tp=tp, units=["block.router", "block.experts"])
    wanted = model(x).item()

    def loss(group: ThreadGroup) -> float:
        own = copy.deepcopy(model)
        Divided(own, plan, group, list(plan.units))
        return float(own(x).item())

    assert on_threads(tp, loss) == pytest.approx([wanted] * tp, rel=1e-6)
