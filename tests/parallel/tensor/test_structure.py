"""Blocks that differ in anything that decides how they divide are not alike; blocks that differ in their number are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from parallel.tensor.blocks import Block, Model
from shardwise.parallel.tensor.calls import kinds_of
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.structure import Structures

X = (torch.randn(2, 3, 8, requires_grad=True),)  # so that the first block is called as the others are


class Settings(nn.Module):
    def __init__(self, setting: Any, *, layer_idx: int = 0) -> None:
        super().__init__()
        self.setting, self.layer_idx = setting, layer_idx
        self.layer = nn.Linear(4, 4)


class Mlp(nn.Module):
    """Whose function between columns and rows is a setting."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.function(self.up(x)))


class Gated(nn.Module):
    """Whose packed parts are sizes in a list."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.packed, self.down = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.packed(x).split(self.sizes, -1)
        shortest = min(self.sizes)
        return x + self.down(torch.cat([p[..., :shortest] for p in (a, b, c)], -1)[..., :8])


class EveryOther(nn.Module):
    """Which does otherwise by the number that it has."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return x + self.down(torch.relu(y) if self.layer_idx % 2 else y.cumsum(-1))


@dataclasses.dataclass(slots=True)
class Config:
    width: int
    function: Callable[..., Any] = torch.relu


class Plain:
    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)
        self.self = self


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (None, "x"),
        ([8, 16], [16, 8]),
        ({"a": 1}, {"a": 2}),
        ({1}, {2}),
        (torch.relu, torch.tanh),
        (functools.partial(F.softmax, dim=-1), functools.partial(F.softmax, dim=1)),
        (Config(width=1), Config(width=2)),
        (Config(width=1), Config(width=1, function=torch.tanh)),
        (Plain(deep=Plain(width=1)), Plain(deep=Plain(width=2))),
    ],
)
def test_another_setting_is_another_structure(one: Any, other: Any) -> None:
    words = Structures()
    assert words.of(Settings(one)) != words.of(Settings(other))
    assert Structures().of(Settings(one)) == words.of(Settings(one))


def test_the_number_of_a_block_and_its_values_are_not() -> None:
    words = Structures()
    assert words.of(Settings([1], layer_idx=3)) == words.of(Settings([1], layer_idx=4))


def test_one_tensor_with_two_names_is_another_structure_than_two() -> None:
    tied, apart = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight

    assert Structures().of(tied) != Structures().of(apart)


@pytest.mark.parametrize(
    "blocks",
    [
        (Mlp(torch.relu), Mlp(functools.partial(F.softmax, dim=-1))),
        (Mlp(lambda x: torch.relu(x)), Mlp(lambda x: x.cumsum(-1))),
        (Gated(8, 8, 8), Gated(4, 8, 12)),
        (EveryOther(1), EveryOther(2)),
    ],
)
def test_what_is_proven_of_a_block_is_not_used_for_one_that_does_otherwise(blocks: tuple[nn.Module, ...]) -> None:
    plan = plan_tensor(Model(*blocks), X, tp=2)
    alone = [plan_tensor(Model(block), X, tp=2).units.get("blocks.0") for block in blocks]

    for number, known in enumerate(alone):
        found = plan.units.get(f"blocks.{number}")
        assert (found and dataclasses.replace(found, proof=None)) == (known and dataclasses.replace(known, proof=None))
    keys = {unit.proof.key for unit in plan.units.values() if unit.proof is not None}
    assert len(keys) == len(plan.units)


def test_blocks_that_are_alike_are_one_kind() -> None:
    x = (torch.randn(2, 3, 16, requires_grad=True),)
    assert [kind.units for kind in kinds_of(Model(Block(), Block(), Block()), x)] == [
        ["blocks.0", "blocks.1", "blocks.2"]
    ]
