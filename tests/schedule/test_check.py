"""The checker accepts every schedule that can run, and names rank and action where a rule is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given

from schedule.helpers import schedule_of, text_of
from schedule.strategies import schedules
from shardwise.errors import ScheduleError
from shardwise.schedule import Edges, Row, Schedule, check, parse_row, with_transfers


@given(schedules())
def test_any_order_that_the_dependencies_allow_is_accepted(made: tuple[Schedule, Edges]) -> None:
    check(*made)


@pytest.mark.parametrize(
    "rows, message",
    [
        (["0F0 1F0 0B0", "1B0"], "rank 0 runs 1F0 and stage 1 is on rank 1"),
        (["0F0 0B0", "1B0"], "1F0 stands in the schedule 0 times; add it"),
        (["0F0 0F0 0B0", "1F0 1B0"], "0F0 stands in the schedule 2 times; drop the repetition"),
        (["0F0 0B0", "1F0"], "stage 1 has for micro-batch 0: 0 B, 0 I, 0 W; keep 1B0 alone or 1I0 and 1W0"),
        (["0F0 0B0 0B0", "1F0 1B0"], "stage 0 has for micro-batch 0: 2 B, 0 I, 0 W"),
        (["0F0 0B0 0W0", "1F0 1B0"], "stage 0 has for micro-batch 0: 1 B, 0 I, 1 W"),
        (["0F0 0I0", "1F0 1B0"], "stage 0 has for micro-batch 0: 0 B, 1 I, 0 W"),
        (["0B0 0F0", "1F0 1B0"], "on rank 0 0B0 stands ahead of 0F0; swap them"),
        (["0F0 0B0", "1I0 1F0 1W0"], "on rank 1 1I0 stands ahead of 1F0"),
        (["0F0 0B0", "1F0 1W0 1I0"], "on rank 1 1W0 stands ahead of 1I0"),
    ],
)
def test_a_broken_rule_is_named(rows: list[str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check(schedule_of(*rows))


def test_an_edge_outside_the_stages_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"found \(0, 2\)"):
        check(schedule_of("0F0 0B0", "1F0 1B0"), frozenset({(0, 2)}))


def test_a_deadlock_is_named_with_the_ranks_and_actions_that_wait_for_each_other() -> None:
    # Rank 0 wants micro-batch 0 back before it sends 1; rank 1 wants 1 first. Rank 2 is not part of it.
    schedule = schedule_of("0F0 0B0 0F1 0B1", "1F1 1F0 1B1 1B0", "2F0 2B0 2F1 2B1")
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    assert str(caught.value) == (
        "ranks wait for each other and none can go on: rank 0 waits at 0B0 for 1B0 of rank 1; "
        "rank 1 waits at 1F1 for 0F1 of rank 0; run one of the awaited actions earlier"
    )


def test_a_rank_that_waits_for_itself_is_named() -> None:
    with pytest.raises(ScheduleError, match="rank 0 waits at 1F0 for 0F0 later in its own row;"):
        check(schedule_of("1F0 0F0", ranks=[(0, 1)]))


def test_a_deadlock_around_an_input_gradient_names_it() -> None:
    schedule = schedule_of("0F0 0I0 0F1 0I1 0W0 0W1", "1F0 1F1 1I0 1I1 1W0 1W1")
    with pytest.raises(ScheduleError, match="rank 0 waits at 0I0 for 1I0 of rank 1"):
        check(schedule)


def test_the_peak_counts_forwards_until_their_weight_gradient_is_done() -> None:
    schedule = schedule_of("0F0 1F0 0F1 1F1 1I0 1B1 0B0 0B1 1W0", ranks=[(0, 1)])
    found = check(schedule)
    assert found.peak_per_rank == (4,)
    assert found.peak_per_stage == (2, 2)
    late = schedule_of("0F0 0I0 0F1 0I1 0W0 0W1")
    assert check(late).peak_per_rank == (2,)
    assert str(check(late)) == "in flight at most 2 micro-batches on rank 0, 1, ..."


TWO = schedule_of("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
ROWS = with_transfers(TWO, prefetch=0)


def _with(rank: int, change: Callable[[str], str]) -> tuple[Row, ...]:
    texts = text_of(ROWS)
    assert change(texts[rank]) != texts[rank]
    texts[rank] = change(texts[rank])
    return tuple(map(parse_row, texts))


def test_rows_made_elsewhere_are_checked_too() -> None:
    assert text_of(ROWS)[1] == "1R0F0 1F0 1R0F1 1F1 1B0 1S0B0 1B1 1S0B1"
    assert check(TWO, rows=ROWS) == check(TWO)


@pytest.mark.parametrize(
    "rank, old, new, message",
    [
        (0, "0F1 ", "", 'rank 0 runs "0F0 0B0 0B1 ..." and not "0F0 0F1 0B0 0B1 ..."'),
        (0, "0S1F1", "1R0F1", r"1R0F1 stands on rank 0, which owns \[0\]; move it to the rank of stage 1"),
        (0, "0S1F1", "0S2F1", "stay within 2 stages, but found 0S2F1"),
        (0, "0S1F1", "3S4F1", "3S4F1 stands on rank 0"),
        (0, "0F0 0S1F0", "0S1F0 0F0", "on rank 0 0S1F0 stands ahead of the action that makes its value"),
        (1, "1R0F1 1F1", "1F1 1R0F1", "on rank 1 1R0F1 stands behind the action that reads it"),
        (0, "0S1F1 ", "", "from rank 0 to rank 1 0S1F1 stands 0 times and not 1; add it"),
        (1, "1R0F1 ", "", "from rank 0 to rank 1 1R0F1 stands 0 times and not 1; add it"),
        (0, "0S1F1", "0S1F1 0S1F1", "0S1F1 stands 2 times and not 1; drop it"),
        (1, "1R0F0 1F0 1R0F1", "1R0F1 1R0F0 1F0", "number 0 is 0S1F0 on one side and 1R0F1 on the other"),
    ],
)
def test_a_misplaced_transfer_is_named(rank: int, old: str, new: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check(TWO, rows=_with(rank, lambda text: text.replace(old, new, 1)))


def test_a_transfer_along_no_edge_is_named() -> None:
    with pytest.raises(ScheduleError, match="0S1F0 stands 1 times and not 0; drop it"):
        check(TWO, frozenset(), rows=ROWS)


def test_a_missing_row_is_named() -> None:
    with pytest.raises(ScheduleError, match="every one of 2 ranks has a row, but there are 1 rows"):
        check(TWO, rows=ROWS[:1])
