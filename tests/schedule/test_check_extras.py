"""What passes add to a row is accepted where it makes sense and named where it does not."""

from __future__ import annotations

import pytest

from schedule.helpers import schedule_of
from shardwise.errors import ScheduleError
from shardwise.schedule import check


@pytest.mark.parametrize(
    "row",
    [
        "0F0 0C0 0B0",
        "0F0 0O0 0L0 0C0 0I0 0W0",
        "0F0 0O0 0F1 0L0 0B0 0B1",
        "0U 0F0 0B0 0H 0G",
        "0U 0F0 0H 0U 0B0 0H",
        "0F0 0I0 0W0 0G",
    ],
)
def test_right_places_are_accepted(row: str) -> None:
    check(schedule_of(row))


@pytest.mark.parametrize(
    "row, message",
    [
        ("0C0 0F0 0B0", "on rank 0 0C0 stands behind nothing; move or drop it"),
        ("0F0 0B0 0C0", "0C0 stands behind 0F0 0B0"),
        ("0F0 0C0 0C0 0B0", "0C0 stands behind 0F0 0C0"),
        ("0F0 0L0 0B0", "0L0 stands behind 0F0; move"),
        ("0F0 0O0 0B0", "0B0 stands behind 0F0 0O0; add 0L0"),
        ("0F0 0O0 0C0 0L0 0B0", "0C0 stands behind 0F0 0O0; add 0L0"),
        ("0F0 0O0 0L0 0O0 0B0", "0O0 stands behind 0F0 0O0 0L0"),
        ("0F0 0G 0B0", "0B0 stands behind 0G; move 0G behind the last B or W"),
        ("0F0 0I0 0G 0W0", "0W0 stands behind 0G"),
        ("0F0 0B0 0G 0G", "0G stands behind 0G"),
        ("0F0 0U 0B0 0H", "0F0 stands while stage 0 is sharded; add or drop a 0U or 0H"),
        ("0U 0U 0F0 0B0", "0U stands where stage 0 is unsharded already"),
        ("0U 0F0 0B0 0H 0H", "0H stands where stage 0 is sharded already"),
    ],
)
def test_a_wrong_place_is_named(row: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check(schedule_of(row))


def test_what_is_computed_again_or_lies_on_the_host_is_not_kept() -> None:
    assert check(schedule_of("0F0 0F1 0C0 0B0 0C1 0B1")).peak_per_rank == (1,)
    assert check(schedule_of("0F0 0O0 0F1 0O1 0L0 0B0 0L1 0B1")).peak_per_rank == (1,)
    assert check(schedule_of("0F0 0F1 0B0 0B1")).peak_per_rank == (2,)
