"""PipeDream-2BW: the windows of a stream that is not drained are data, free of deadlock, and 1F1B without its ends."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.errors import ScheduleError
from shardwise.schedule import Action, Costs, Kind, Row, check, print_row, simulate, with_transfers
from shardwise.schedule import pipedream_2bw as two_versions

SIZES = [(1, 1), (1, 3), (2, 2), (2, 3), (3, 3), (4, 4), (4, 7), (8, 8)]


def actions(row: Row) -> str:
    return print_row(tuple(item for item in row if isinstance(item, Action)))


def test_three_steps_without_a_flush_look_like_this() -> None:
    schedule = two_versions.unrolled(num_ranks=3, num_micro_batches=3, num_steps=3)
    assert picture_of(schedule) == (
        "rank 0  0>1>2>........0<<<3>1<<<4>2<<<5>3<<<6>4<<<7>5<<<8>6<<<..7<<<..8<<<\n"
        "rank 1  ..0>1>....0<<<2>1<<<3>2<<<4>3<<<5>4<<<6>5<<<7>6<<<8>7<<<..8<<<....\n"
        "rank 2  ....0>0<<<1>1<<<2>2<<<3>3<<<4>4<<<5>5<<<6>6<<<7>7<<<8>8<<<........"
    )
    assert picture_in(two_versions) == picture_of(schedule)


def test_a_window_ends_with_the_first_forwards_of_the_next_step() -> None:
    made = two_versions.windows(num_ranks=3, num_micro_batches=4)
    assert actions(made.row(0, first=True, last=False)) == "0F0 0F1 0F2 0B0 0F3 0B1 0F4 0B2 0F5 0B3"
    assert actions(made.row(0, first=False, last=False)) == "0F2 0B0 0F3 0B1 0F4 0B2 0F5 0B3"
    assert actions(made.row(0, first=False, last=False, slot=1)) == "0F6 0B4 0F7 0B5 0F0 0B6 0F1 0B7"
    assert actions(made.row(0, first=False, last=True)) == "0F2 0B0 0F3 0B1 0B2 0B3"
    assert actions(made.row(0, first=True, last=True)) == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"
    assert actions(made.row(2, first=False, last=False)) == "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"


@pytest.mark.parametrize("p, m", SIZES)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_windows_one_behind_another_are_the_stream_without_a_flush(p: int, m: int, num_steps: int) -> None:
    made = two_versions.windows(num_ranks=p, num_micro_batches=m)
    stream = with_transfers(two_versions.unrolled(num_ranks=p, num_micro_batches=m, num_steps=num_steps))
    for rank in range(p):
        joined = [
            item for t in range(num_steps) for item in made.row(rank, first=t == 0, last=t == num_steps - 1, slot=t % 2)
        ]
        assert [str(item) for item in joined] == [numbered(item, m) for item in stream[rank]]


def numbered(item: object, m: int) -> str:
    """With micro-batches numbered as in windows."""
    text, number = str(item), item.micro_batch  # type: ignore[attr-defined]
    return text.removesuffix(str(number)) + str(number % (2 * m))


@pytest.mark.parametrize("edges", [None, frozenset({(0, 1), (1, 2), (2, 3), (0, 3), (1, 3)})])
def test_several_steps_are_free_of_deadlock_on_a_graph_with_skips_too(edges: frozenset[tuple[int, int]] | None) -> None:
    schedule = two_versions.unrolled(num_ranks=4, num_micro_batches=5, num_steps=6)
    assert check(schedule, edges).peak_per_stage == (4, 3, 2, 1)
    two_versions.windows(num_ranks=4, num_micro_batches=5, edges=edges)


@pytest.mark.parametrize("p, m", SIZES)
def test_bubble_of_the_ends_alone_and_peak_of_1f1b(p: int, m: int) -> None:
    for num_steps in (1, 4, 16):
        schedule = two_versions.unrolled(num_ranks=p, num_micro_batches=m, num_steps=num_steps)
        timeline = simulate(schedule, costs=Costs.uniform(p))
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (num_steps * m + p - 1))
        assert check(schedule).peak_per_stage == tuple(min(p - s, num_steps * m) for s in range(p))


@pytest.mark.parametrize("p, m", SIZES)
def test_a_further_step_takes_what_its_micro_batches_take_and_no_bubble(p: int, m: int) -> None:
    def seconds(num_steps: int) -> float:
        schedule = two_versions.unrolled(num_ranks=p, num_micro_batches=m, num_steps=num_steps)
        return simulate(schedule, costs=Costs.uniform(p)).seconds

    assert seconds(7) - seconds(6) == pytest.approx(3.0 * m)


@pytest.mark.parametrize("p, m", SIZES)
def test_two_versions_are_enough_and_nobody_waits_for_what_an_update_needs(p: int, m: int) -> None:
    """W(t+1) replaces W(t-1): the last backward of step t is ahead of the first forward of step t+2 on every rank. What
    that forward needs of the other ranks they give m - p pairs of actions behind their last backward of step t."""
    schedule = two_versions.unrolled(num_ranks=p, num_micro_batches=m, num_steps=5)
    timeline = simulate(schedule, costs=Costs.uniform(p))
    spans = {span.action: span for span in timeline.spans if isinstance(span.action, Action)}
    for t in range(3):
        lasts = [Action(kind=Kind.B, stage=s, micro_batch=m * (t + 1) - 1) for s in range(p)]
        firsts = [Action(kind=Kind.F, stage=s, micro_batch=m * (t + 2)) for s in range(p)]
        given_s = []
        for row, last, first in zip(schedule.actions, lasts, firsts, strict=True):
            at = row.index(last) + 1 + 2 * (m - p)
            assert at <= row.index(first)
            given_s.append(spans[row[at]].start_s)
        assert all(max(given_s) <= spans[first].start_s for first in firsts)


def test_fewer_micro_batches_than_stages_are_refused_with_the_numbers() -> None:
    with pytest.raises(ScheduleError, match="there are 3 for 4 stages; use 4 micro-batches or more"):
        two_versions.windows(num_ranks=4, num_micro_batches=3)
    assert two_versions.generate(num_ranks=4, num_micro_batches=3).name == "pipedream-2bw"  # a step by itself


def test_receives_that_would_be_posted_two_steps_ahead_are_refused() -> None:
    with pytest.raises(ScheduleError, match="lower prefetch"):
        two_versions.windows(num_ranks=4, num_micro_batches=4, prefetch=12)
