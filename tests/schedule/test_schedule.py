"""A schedule is a value: checked when made, and the same after JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from schedule.helpers import schedule_of
from schedule.strategies import schedules
from shardwise.errors import ScheduleError
from shardwise.schedule import Edges, Schedule, forward_only, generate

TWO = generate("gpipe", num_ranks=2, num_micro_batches=2)


@given(schedules())
def test_a_schedule_survives_json(made: tuple[Schedule, Edges]) -> None:
    assert Schedule.from_json(made[0].to_json()) == made[0]


def test_json_holds_one_readable_row_a_rank() -> None:
    assert json.loads(TWO.to_json()) == {
        "name": "gpipe",
        "num_stages": 2,
        "num_micro_batches": 2,
        "ranks": [[0], [1]],
        "actions": ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"],
    }
    assert TWO.text_rows() == ("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
    assert str(TWO) == "gpipe: 2 stages on 2 ranks, 2 micro-batches"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x"}', "3", "null"])
def test_json_that_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="compare with the output of Schedule.to_json"):
        Schedule.from_json(text)


def test_transfers_do_not_stand_in_a_schedule() -> None:
    with pytest.raises(ScheduleError, match="a row holds 0S1F0; leave it out"):
        Schedule.from_json(TWO.to_json().replace("0F0 ", "0F0 0S1F0 "))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_stages": 0}, "got 0 stages and 2 micro-batches"),
        ({"num_micro_batches": 0}, "got 2 stages and 0 micro-batches"),
        ({"num_stages": 3}, "every stage 0 to 2 has exactly one rank"),
        ({"ranks": ((0,), (0,))}, "name each stage once"),
        ({"ranks": ((0, 1), ())}, "rank 1 owns none; use fewer ranks"),
        ({"ranks": ((0, 1),)}, "there are 1 ranks and 2 rows"),
        ({"num_micro_batches": 1}, "rank 0 holds 0F1; drop it or raise the count"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        replace(TWO, **changes)


def test_the_owner_of_each_stage_is_known() -> None:
    v_shaped = schedule_of("0F0 3F0", "1F0 2F0", ranks=[(0, 3), (1, 2)])
    assert v_shaped.owners == (0, 1, 1, 0)
    assert v_shaped.num_ranks == 2


def test_a_schedule_without_its_backwards_is_forward_only() -> None:
    assert not TWO.forward_only
    assert forward_only(TWO).forward_only
    assert forward_only(TWO).text_rows() == ("0F0 0F1", "1F0 1F1")
