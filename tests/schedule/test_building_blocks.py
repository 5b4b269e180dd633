"""Squeezed blocks stay within their capacity, and steps of the block trade memory for time."""

from __future__ import annotations

import pytest

from shardwise.schedule import Costs, Schedule, check, simulate
from shardwise.schedule.building_blocks import squeezed_v


def squeezed(p: int, m: int, *, down: int, up: int, capacity: int) -> Schedule:
    return squeezed_v("v", num_ranks=p, num_micro_batches=m, down=down, up=up, delay=0, capacity=capacity)


@pytest.mark.parametrize("capacity", [4, 5])
def test_no_rank_keeps_more_than_the_capacity(capacity: int) -> None:
    assert max(check(squeezed(4, 16, down=1, up=1, capacity=capacity)).peak_per_rank) == capacity


def test_larger_steps_keep_more_and_wait_less() -> None:
    p, m = 8, 32
    made = [squeezed(p, m, down=down, up=up, capacity=2 * p) for down, up in ((1, 1), (1, 2), (2, 4))]
    peaks = [max(check(schedule).peak_per_rank) for schedule in made]
    seconds = [simulate(schedule, costs=Costs.uniform(2 * p)).seconds for schedule in made]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[2]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[2]
