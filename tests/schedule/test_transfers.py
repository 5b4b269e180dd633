"""Sends stand behind what makes their value, receives ahead of what reads it, in the order of the sends."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule.helpers import schedule_of, text_of
from schedule.strategies import schedules
from shardwise.errors import ScheduleError
from shardwise.schedule import Action, Edges, Row, Schedule, Transfer, TransferKind, generate, with_transfers

GPIPE = generate("gpipe", num_ranks=2, num_micro_batches=3)


def test_with_no_prefetch_a_receive_stands_right_ahead_of_its_reader() -> None:
    assert text_of(with_transfers(GPIPE, prefetch=0)) == [
        "0F0 0S1F0 0F1 0S1F1 0F2 0S1F2 0R1B0 0B0 0R1B1 0B1 0R1B2 0B2",
        "1R0F0 1F0 1R0F1 1F1 1R0F2 1F2 1B0 1S0B0 1B1 1S0B1 1B2 1S0B2",
    ]


def test_a_receive_stands_two_actions_ahead_unless_told_otherwise() -> None:
    assert text_of(with_transfers(GPIPE)) == [
        "0F0 0S1F0 0R1B0 0F1 0S1F1 0R1B1 0F2 0S1F2 0R1B2 0B0 0B1 0B2",
        "1R0F0 1R0F1 1R0F2 1F0 1F1 1F2 1B0 1S0B0 1B1 1S0B1 1B2 1S0B2",
    ]


def test_a_receive_moves_ahead_where_its_reader_comes_before_an_earlier_sends_reader() -> None:
    # Rank 0 sends micro-batch 0 first, rank 1 reads micro-batch 1 first.
    schedule = schedule_of("0F0 0F1", "1F1 1F0")
    assert text_of(with_transfers(schedule, prefetch=0)) == ["0F0 0S1F0 0F1 0S1F1", "1R0F0 1R0F1 1F1 1F0"]


def test_the_input_gradient_is_sent_before_the_weight_gradient_is_computed() -> None:
    schedule = schedule_of("0F0 0I0 0W0", "1F0 1I0 1W0")
    assert text_of(with_transfers(schedule, prefetch=0)) == [
        "0F0 0S1F0 0R1B0 0I0 0W0",
        "1R0F0 1F0 1I0 1S0B0 1W0",
    ]


def test_stages_of_one_rank_need_no_transfer() -> None:
    schedule = schedule_of("0F0 1F0", "2F0", ranks=[(0, 1), (2,)])
    edges = frozenset({(0, 1), (0, 2), (1, 2)})
    assert text_of(with_transfers(schedule, edges)) == ["0F0 0S2F0 1F0 1S2F0", "2R0F0 2R1F0 2F0"]


def test_a_value_that_nobody_reads_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="no action reads 0S1F0; add the forward of stage 1"):
        with_transfers(schedule_of("0F0", "1F1"))


def test_a_negative_prefetch_is_refused() -> None:
    with pytest.raises(ScheduleError, match="prefetch=-1; use 0 or more"):
        with_transfers(GPIPE, prefetch=-1)


@given(schedules(), st.integers(0, 3))
def test_the_transfers_of_any_schedule_are_the_edges_that_cross_ranks(
    made: tuple[Schedule, Edges], prefetch: int
) -> None:
    schedule, edges = made
    owners = schedule.owners
    rows = with_transfers(schedule, edges, prefetch=prefetch)
    assert tuple(tuple(i for i in row if isinstance(i, Action)) for row in rows) == schedule.actions
    crossing = {(s, t) for s, t in edges if owners[s] != owners[t]}
    both_ways = crossing | {(t, s) for s, t in crossing}
    for kind in TransferKind:
        moved = [t for row in rows for t in row if isinstance(t, Transfer) and t.kind is kind]
        expected = {(s, t, m) for s, t in both_ways for m in range(schedule.num_micro_batches)}
        assert sorted((t.source, t.target, t.micro_batch) for t in moved) == sorted(expected)
    assert _order(rows, owners, TransferKind.SEND) == _order(rows, owners, TransferKind.RECV)


def _order(
    rows: tuple[Row, ...], owners: tuple[int, ...], kind: TransferKind
) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    order = defaultdict(list)
    for row in rows:
        for item in row:
            if isinstance(item, Transfer) and item.kind is kind:
                link = owners[item.source], owners[item.target]
                order[link].append((item.source, item.target, item.micro_batch))
    return order
