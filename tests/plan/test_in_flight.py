"""Micro-batches kept at a rank's peak, of every schedule: times what one keeps they are the schedule's own peak."""

from __future__ import annotations

import pytest

from shardwise.plan.in_flight import kept_micro_batches
from shardwise.plan.stage_work import StageWork
from shardwise.schedule import GENERATORS, forward_only, generate
from shardwise.schedule.memory import Memory, peak_bytes


def _stages(number: int) -> list[StageWork]:
    return [
        StageWork(stage=s, parameters=1, trained=1, kernels=(), saved_bytes=100.0 + 7 * s, weight_bytes=40.0 + s)
        for s in range(number)
    ]


@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_kept_is_the_peak_of_the_schedule(name: str) -> None:
    schedule = generate(name, num_ranks=4, num_micro_batches=8)
    stages = _stages(schedule.num_stages)
    numbers = kept_micro_batches(schedule, stages)
    kept = [sum(numbers[s] * stages[s].saved_bytes for s in own) for own in schedule.ranks]
    memory = Memory(
        activation_bytes=tuple(stage.saved_bytes for stage in stages),
        weight_bytes=tuple(stage.weight_bytes for stage in stages),
    )
    assert kept == pytest.approx(peak_bytes(schedule, memory))


def test_of_1f1b_the_first_stage_keeps_one_for_each_rank() -> None:
    schedule = generate("1f1b", num_ranks=4, num_micro_batches=8)
    assert kept_micro_batches(schedule, _stages(4)) == (4, 3, 2, 1)


def test_without_backwards_nothing_is_kept() -> None:
    schedule = forward_only(generate("1f1b", num_ranks=2, num_micro_batches=2))
    assert kept_micro_batches(schedule, _stages(2)) == (0, 0)
