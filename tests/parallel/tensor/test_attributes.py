"""The search for numbers that follow a division looks where the division is, and nowhere twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from parallel.tensor.blocks import Block, call_of, hand_plan
from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor import attributes
from shardwise.parallel.tensor.attributes import Tries, fits
from shardwise.parallel.tensor.instance import random_copy

CALL = call_of(2, 3, 16)


class Counted(nn.Module):
    """Two numbers of groups: one beside channels that are divided, one beside whole ones."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.GroupNorm(4, 16)
        self.up, self.between, self.down = nn.Conv1d(16, 32, 1), nn.GroupNorm(8, 32), nn.Conv1d(32, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.between(self.up(self.before(x))))


def counted_plan() -> UnitPlan:
    half = Slice.even(0, 32, 2)
    slices = dict.fromkeys(("up.weight", "up.bias", "between.weight", "between.bias"), half)
    return UnitPlan(copies=("up",), reduces=("down",), slices={**slices, "down.weight": Slice.even(1, 32, 2)})


def bare_plan() -> UnitPlan:
    plan = hand_plan()
    return UnitPlan(copies=plan.copies, reduces=plan.reduces, slices=plan.slices)


def test_heads_are_found_first() -> None:
    first = next(fits(random_copy(Block()), CALL, bare_plan(), module="attention", tp=2))

    assert first.attributes == {("attention", "num_heads"): 2, ("attention", "num_kv_heads"): 1}


def test_only_numbers_beside_divided_tensors_are_changed_once_a_fit_runs_through() -> None:
    found = list(fits(random_copy(Counted()), call_of(2, 16, 5), counted_plan(), module="", tp=2))

    assert [dict(fit.attributes) for fit in found] == [{}, {("between", "num_groups"): 4}]


def test_nothing_is_tried_twice_for_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    once = attributes._try

    def counting(*args: object) -> object:
        runs.append(1)
        return once(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(attributes, "_try", counting)
    unit, tries = random_copy(Block()), Tries()
    first = next(fits(unit, CALL, bare_plan(), module="attention", tp=2, tries=tries))
    before = len(runs)
    again = next(fits(unit, CALL, bare_plan(), module="attention", tp=2, tries=tries))

    assert again == first
    assert len(runs) == before > 0
