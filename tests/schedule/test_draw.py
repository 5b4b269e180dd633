"""A drawing shows at a glance who runs what, and is read without colour."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule.helpers import picture_in, picture_of, schedule_of
from schedule.strategies import schedules
from shardwise.errors import ScheduleError
from shardwise.schedule import Costs, Edges, Schedule, Span, Timeline, draw, generate, parse, simulate


def test_a_newcomer_reads_numbers_arrows_and_a_legend() -> None:
    schedule = generate("gpipe", num_ranks=2, num_micro_batches=2)
    assert draw(simulate(schedule, costs=Costs.uniform(2))) == (
        "rank 0  0>1>......0<<<1<<<\n"
        "rank 1  ..0>1>0<<<1<<<....\n"
        "\n"
        "3> forward of micro-batch 3   3< backward of micro-batch 3   . idle\n"
        "2 ranks, 9 s, bubble 33.3 %"
    )


def test_split_backwards_have_marks_of_their_own() -> None:
    drawing = draw(simulate(schedule_of("0F0 0I0 0W0"), costs=Costs.uniform(1)))
    assert drawing.splitlines()[0] == "rank 0  0>0<0="
    assert "3< input gradient of micro-batch 3   3= weight gradient of micro-batch 3" in drawing


def test_whole_and_split_backwards_share_a_mark_and_the_legend_says_so() -> None:
    drawing = draw(simulate(schedule_of("0F0 0F1 0B0 0I1 0W1"), costs=Costs.uniform(1)))
    assert drawing.splitlines()[0] == "rank 0  0>1>0<<<1<1="
    assert "3< backward or input gradient of micro-batch 3   3= weight gradient" in drawing


def test_a_rank_with_several_stages_has_one_row_and_other_marks_for_each() -> None:
    rows = ("0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1")
    schedule = schedule_of(*rows, ranks=[(0, 2), (1, 3)])
    assert picture_of(schedule) == picture_in(sys.modules[draw.__module__]).partition("\n")[2].partition("\n")[2]
    legend = draw(simulate(schedule, costs=Costs.uniform(4))).splitlines()[3:5]
    assert legend == [
        "3> forward of micro-batch 3   3< backward of micro-batch 3   . idle",
        "> < on the first, ) ( on the second stage of a rank",
    ]


def test_the_stages_of_a_rank_are_told_apart_where_only_one_rank_has_several() -> None:
    assert picture_of(schedule_of("0F0 2F0", "1F0", ranks=[(0, 2), (1,)])) == "rank 0  0>..0)\nrank 1  ..0>.."


def test_long_numbers_get_the_room_they_need() -> None:
    last = picture_of(generate("gpipe", num_ranks=1, num_micro_batches=11))
    assert last.startswith("rank 0  0>>1>>2>>")
    assert last.endswith("10<<<<")


def test_a_narrow_drawing_keeps_the_marks() -> None:
    timeline = simulate(generate("gpipe", num_ranks=2, num_micro_batches=2), costs=Costs.uniform(2))
    assert draw(timeline, width=9).splitlines()[:2] == ["rank 0  >>...0<1<", "rank 1  .>>0<1<.."]


def test_a_recorded_timeline_starts_at_its_first_span_and_keeps_idle_ranks() -> None:
    recorded = Timeline(num_ranks=2, spans=(Span(rank=1, action=parse("1F7"), start_s=100.0, end_s=100.5),))
    assert draw(recorded, width=5).splitlines()[:2] == ["rank 0  .....", "rank 1  7>>>>"]
    assert draw(Timeline(num_ranks=1, spans=())).splitlines()[0] == "rank 0  ."


@given(schedules(), st.integers(1, 60))
def test_all_rows_are_as_wide_as_asked(made: tuple[Schedule, Edges], width: int) -> None:
    schedule, edges = made
    costs = Costs.uniform(schedule.num_stages, forward=0.3, backward=1.1)
    drawing = draw(simulate(schedule, edges, costs=costs), width=width)
    rows = drawing.partition("\n\n")[0].splitlines()
    assert {len(row.rpartition(" ")[2]) for row in rows} == {width}


def test_no_drawing_is_wider_than_a_wide_terminal_unless_asked() -> None:
    timeline = simulate(generate("naive", num_ranks=4, num_micro_batches=8), costs=Costs.uniform(4))
    assert len(draw(timeline).splitlines()[0]) <= len("rank 0  ") + 160


def test_a_drawing_without_columns_is_refused() -> None:
    with pytest.raises(ScheduleError, match="width=0; use 80"):
        draw(Timeline(num_ranks=1, spans=()), width=0)
