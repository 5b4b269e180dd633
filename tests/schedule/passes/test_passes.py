"""Every pass keeps the order of work, gives a schedule that the checker accepts, and looks as its file says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.helpers import schedule_of
from schedule.strategies import schedules
from shardwise.errors import ScheduleError
from shardwise.schedule import Action, Costs, Edges, Kind, Schedule, StageKind, check, generate, simulate
from shardwise.schedule.passes import (
    merge_backwards,
    split_backwards,
    with_offload,
    with_recompute,
    with_reductions,
    with_sharding,
)

BEFORE = (Kind.F, Kind.B, Kind.I, Kind.W)


def text(schedule: Schedule) -> str:
    return schedule.text_rows()[0]


def test_a_backward_is_split_into_halves_side_by_side() -> None:
    assert text(split_backwards(schedule_of("0F0 0B0"))) == "0F0 0I0 0W0"
    both = schedule_of("0F0 1F0 1B0 0B0", ranks=[(0, 1)])
    assert text(split_backwards(both, {1})) == "0F0 1F0 1I0 1W0 0B0"


def test_halves_are_joined_only_where_they_stand_side_by_side() -> None:
    assert text(merge_backwards(schedule_of("0F0 0F1 0I0 0I1 0W1 0W0"))) == "0F0 0F1 0I0 0B1 0W0"
    both = schedule_of("0F0 1F0 1I0 1W0 0I0 0W0", ranks=[(0, 1)])
    assert text(merge_backwards(both, {0})) == "0F0 1F0 1I0 1W0 0B0"


def test_a_gradient_is_reduced_as_soon_as_it_is_final() -> None:
    schedule = schedule_of("0F0 2F0 2B0 0B0", "1F0 1B0", ranks=[(0, 2), (1,)])
    assert text(with_reductions(schedule)) == "0F0 2F0 2B0 2G 0B0 0G"
    assert text(with_reductions(schedule, overlap=False)) == "0F0 2F0 2B0 0B0 2G 0G"
    assert text(with_reductions(with_reductions(schedule, overlap=False))) == text(with_reductions(schedule))


def test_a_shared_weight_is_reduced_behind_the_last_stage_of_the_rank_that_holds_it() -> None:
    schedule = schedule_of("0F0 2F0 2I0 2W0 0I0 0W0", "1F0 1B0", ranks=[(0, 2), (1,)])
    assert text(with_reductions(schedule, [{0, 2}])) == "0F0 2F0 2I0 2W0 0I0 0W0 2G 0G"
    assert text(with_reductions(schedule, [{0, 1}, {1, 2}])) == "0F0 2F0 2I0 2W0 0I0 0W0 2G 0G"
    assert text(with_reductions(schedule, [{1, 2}])) == "0F0 2F0 2I0 2W0 2G 0I0 0W0 0G"


def test_a_forward_is_run_again_right_ahead_of_its_backward_and_keeps_one_micro_batch_whole() -> None:
    schedule = with_recompute(schedule_of("0F0 0F1 0B0 0B1"))
    assert text(schedule) == "0F0 0F1 0C0 0B0 0C1 0B1"
    assert check(schedule).peak_per_rank == (1,)


def test_running_a_forward_again_costs_what_a_forward_does_unless_told_otherwise() -> None:
    schedule = with_recompute(schedule_of("0F0 0B0"))
    assert simulate(schedule, costs=Costs.uniform(1)).seconds == 4
    costs = Costs(compute_seconds={Kind.F: (1.0,), Kind.B: (2.0,), Kind.C: (0.5,)})
    assert simulate(schedule, costs=costs).seconds == 3.5


def test_a_forward_is_run_again_while_the_gradient_is_on_its_way() -> None:
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=1)
    costs = Costs.uniform(2)
    assert simulate(with_recompute(schedule, {0}), costs=costs).seconds == simulate(schedule, costs=costs).seconds


def test_what_is_offloaded_is_loaded_some_actions_ahead() -> None:
    schedule = schedule_of("0F0 0F1 0F2 0B0 0B1 0B2")
    assert text(with_offload(schedule, distance=0)) == "0F0 0O0 0F1 0O1 0F2 0O2 0L0 0B0 0L1 0B1 0L2 0B2"
    assert text(with_offload(schedule, distance=1)) == "0F0 0O0 0F1 0O1 0L0 0F2 0O2 0L1 0B0 0L2 0B1 0B2"


def test_what_is_needed_too_soon_stays_on_the_device() -> None:
    assert text(with_offload(schedule_of("0F0 0B0 0F1 0B1"), distance=0)) == "0F0 0B0 0F1 0B1"
    last = with_offload(generate("1f1b", num_ranks=2, num_micro_batches=4))
    assert last.text_rows()[1] == "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3"


def test_moving_to_the_host_takes_its_own_time_and_a_late_load_is_waited_for() -> None:
    schedule = with_offload(schedule_of("0F0 0F1 0B0 0B1"), distance=0)
    costs = Costs(compute_seconds={Kind.F: (1.0,), Kind.B: (2.0,)}, beside_seconds={Kind.O: (0.5,), Kind.L: (3.0,)})
    found = {str(span.action): (span.start_s, span.end_s) for span in simulate(schedule, costs=costs).spans}
    assert found["0O0"] == (1, 1.5)
    assert found["0F1"] == (1, 2)
    assert found["0L0"] == (2, 5)
    assert found["0B0"] == (5, 7)
    assert found["0L1"] == (7, 10)


def test_what_is_still_on_its_way_to_the_host_is_not_loaded_yet() -> None:
    schedule = with_offload(schedule_of("0F0 0F1 0B0 0B1"), {0}, distance=0)
    costs = Costs(compute_seconds={Kind.F: (1.0,), Kind.B: (2.0,)}, beside_seconds={Kind.O: (5.0,), Kind.L: (1.0,)})
    timeline = simulate(schedule, costs=costs)
    found = {str(span.action): (span.start_s, span.end_s) for span in timeline.spans}
    assert timeline.busy_seconds == (6,)  # moving is no work of the rank
    assert found["0O0"] == (1, 6)
    assert found["0L0"] == (6, 7)
    assert found["0O1"] == (6, 11)  # one after another; loads have a way of their own
    assert found["0B0"] == (7, 9)
    assert found["0B1"] == (12, 14)


def test_a_reduction_runs_beside_the_work_and_may_end_after_it() -> None:
    schedule = with_reductions(schedule_of("0F0 1F0 1B0 0B0", ranks=[(0, 1)]))
    costs = Costs(compute_seconds={Kind.F: (1.0,) * 2, Kind.B: (2.0,) * 2}, beside_seconds={StageKind.G: (4.0, 3.0)})
    timeline = simulate(schedule, costs=costs)
    found = {str(span.action): (span.start_s, span.end_s) for span in timeline.spans}
    assert found["1G"] == (4, 7)  # stage 0 computes from 4 to 6
    assert found["0G"] == (7, 11)
    assert timeline.busy_seconds == (6,)
    assert timeline.seconds == 11


def test_parameters_are_gathered_ahead_of_the_work_and_given_back_behind_it() -> None:
    schedule = schedule_of("0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 1B0 1B1", ranks=[(0, 2), (1,)])
    assert text(with_sharding(schedule)) == "0U 2U 0F0 0F1 2F0 2F1 2B0 2B1 2H 0B0 0B1 0H"
    one = "0U 0F0 0F1 0H 2U 2F0 2F1 2B0 2B1 2H 0U 0B0 0B1 0H"
    assert text(with_sharding(schedule, most_unsharded=1)) == one
    assert text(with_sharding(schedule, {2})) == "0F0 0F1 2U 2F0 2F1 2B0 2B1 0B0 0B1 2H"


def test_work_waits_until_its_parameters_are_gathered() -> None:
    schedule = with_sharding(schedule_of("0F0 0B0"))
    costs = Costs(compute_seconds={Kind.F: (1.0,), Kind.B: (2.0,)}, beside_seconds={StageKind.U: (5.0,)})
    assert simulate(schedule, costs=costs).seconds == 8


def test_breadth_first_gathers_each_stage_once_and_1f1b_of_two_stages_many_times() -> None:
    def gathers(name: str) -> int:
        schedule = with_sharding(generate(name, num_ranks=2, num_micro_batches=8), most_unsharded=1)
        return sum(action.kind is StageKind.U for action in schedule.actions[0])

    assert gathers("looped-bfs") == 3  # forward of both stages, backward of the first
    assert gathers("interleaved") > 8


@settings(deadline=2000)
@given(schedules(), st.integers(0, 3), st.integers(1, 3), st.data())
def test_all_together_keep_the_order_of_work_and_pass_the_checker(
    made: tuple[Schedule, Edges], distance: int, most: int, data: st.DataObject
) -> None:
    schedule, edges = made
    stages = data.draw(st.sets(st.integers(0, schedule.num_stages - 1)))
    changed = with_reductions(schedule, [stages])
    changed = with_sharding(with_offload(with_recompute(changed, stages), distance=distance), most_unsharded=most)
    for row, before in zip(changed.actions, schedule.actions, strict=True):
        assert tuple(a for a in row if isinstance(a, Action) and a.kind in BEFORE) == before
    check(changed, edges)
    assert Schedule.from_json(changed.to_json()) == changed
    simulate(changed, edges, costs=Costs.uniform(schedule.num_stages))
    assert merge_backwards(split_backwards(schedule)) == merge_backwards(schedule)


def test_wrong_numbers_are_refused() -> None:
    schedule = schedule_of("0F0 0B0")
    with pytest.raises(ScheduleError, match="was to recompute stage 3; name stages from 0 to 0"):
        with_recompute(schedule, {3})
    with pytest.raises(ScheduleError, match="0C0 stands already"):
        with_recompute(with_recompute(schedule))
    with pytest.raises(ScheduleError, match="distance=-1; use 2"):
        with_offload(schedule, distance=-1)
    with pytest.raises(ScheduleError, match="most_unsharded=0; use 2"):
        with_sharding(schedule, most_unsharded=0)
