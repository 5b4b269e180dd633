"""Proofs of one unit share the runs of the whole unit, and end at the first output that differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from parallel.tensor.blocks import Block, call_of, hand_plan
from shardwise.parallel.tensor import prove as proving
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.prove import Difference, Wholes, prove

CALL = call_of(2, 3, 16)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every backward pass that was made."""
    made: list[int] = []
    once = proving._backward

    def counting(*args: Any) -> None:
        made.append(1)
        once(*args)

    monkeypatch.setattr(proving, "_backward", counting)
    return made


def test_the_whole_unit_runs_once_for_many_plans(backwards: list[int]) -> None:
    unit, wholes = random_copy(Block()), Wholes()
    for _ in range(2):
        prove(unit, CALL, hand_plan(), tp=2, training=True, wholes=wholes)

    assert len(backwards) == 1 + 2 * 2  # whole; two ranks, twice


def test_a_mode_and_numbers_of_their_own_are_runs_of_their_own(backwards: list[int]) -> None:
    unit, wholes = random_copy(Block()), Wholes()
    for training, seed in ((True, 0), (False, 0), (True, 1)):
        prove(unit, CALL, hand_plan(), tp=2, training=training, seed=seed, wholes=wholes)

    assert len(backwards) == 3 * (1 + 2)


def test_no_gradient_is_asked_of_outputs_that_differ(backwards: list[int]) -> None:
    with pytest.raises(Difference, match="output 0 differs"):
        prove(random_copy(Block()), CALL, dataclasses.replace(hand_plan(), reduces=("down",)), tp=2, training=True)

    assert len(backwards) == 1
