"""What ranks keep, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given

from schedule.helpers import schedule_of
from schedule.strategies import schedules
from shardwise.errors import ScheduleError
from shardwise.schedule import Edges, Schedule, check, forward_only, generate
from shardwise.schedule.memory import Memory, fits, peak_bytes


def test_an_input_gradient_frees_all_but_what_the_weight_gradient_reads() -> None:
    memory = Memory(activation_bytes=(10.0,), weight_bytes=(4.0,))
    assert peak_bytes(schedule_of("0F0 0F1 0I0 0I1 0W0 0W1"), memory) == (20.0,)
    assert peak_bytes(schedule_of("0F0 0I0 0F1 0I1 0W0 0W1"), memory) == (14.0,)
    assert peak_bytes(schedule_of("0F0 0I0 0W0 0F1 0B1"), memory) == (10.0,)


def test_what_a_weight_gradient_reads_may_be_more_than_the_forward_kept() -> None:
    memory = Memory(activation_bytes=(1.0,), weight_bytes=(3.0,))
    assert peak_bytes(schedule_of("0F0 0I0 0F1 0I1 0W0 0W1"), memory) == (6.0,)


def test_a_stage_that_computes_its_forward_again_keeps_its_inputs_until_then() -> None:
    memory = Memory(activation_bytes=(10.0,), weight_bytes=(4.0,), input_bytes=(1.0,))
    assert peak_bytes(schedule_of("0F0 0F1 0F2 0C0 0B0 0C1 0B1 0C2 0I2 0W2"), memory) == (12.0,)


def test_what_is_on_the_host_is_not_kept() -> None:
    memory = Memory(activation_bytes=(10.0,), weight_bytes=(4.0,))
    assert peak_bytes(schedule_of("0F0 0O0 0F1 0O1 0L0 0B0 0L1 0B1"), memory) == (10.0,)
    assert peak_bytes(schedule_of("0F0 0O0 0F1 0B1 0L0 0B0"), memory) == (10.0,)


def test_the_stages_of_a_rank_add_up() -> None:
    memory = Memory(activation_bytes=(1.0, 2.0, 4.0, 8.0), weight_bytes=(0.0,) * 4)
    schedule = schedule_of("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0", ranks=[[0, 3], [1, 2]])
    assert peak_bytes(schedule, memory) == (9.0, 6.0)


@given(schedules())
def test_counted_in_micro_batches_it_is_what_check_counts(case: tuple[Schedule, Edges]) -> None:
    schedule, edges = case
    one = (1.0,) * schedule.num_stages
    assert peak_bytes(schedule, Memory(activation_bytes=one, weight_bytes=one)) == check(schedule, edges).peak_per_rank


def test_forwards_without_a_backward_keep_nothing() -> None:
    schedule = forward_only(generate("1f1b", num_ranks=3, num_micro_batches=4))
    assert peak_bytes(schedule, Memory(activation_bytes=(1.0,) * 3, weight_bytes=(1.0,) * 3)) == (0.0,) * 3


def test_a_schedule_fits_where_no_rank_is_above_its_limit() -> None:
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=4)  # 2 in flight on rank 0, 1 on rank 1
    kept = {"activation_bytes": (1.0, 1.0), "weight_bytes": (0.0, 0.0)}
    assert fits(schedule, None)
    assert fits(schedule, Memory(**kept))
    assert fits(schedule, Memory(**kept, limit_bytes=(2.0, 1.0)))
    assert fits(schedule, Memory(**kept, limit_bytes=(None, 1.0)))
    assert not fits(schedule, Memory(**kept, limit_bytes=(1.9, 1.0)))


def test_memory_of_other_stages_or_ranks_is_refused() -> None:
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=2)
    with pytest.raises(ScheduleError, match="each of 2 stages, but for 3"):
        peak_bytes(schedule, Memory(activation_bytes=(1.0,) * 3, weight_bytes=(1.0,) * 3))
    with pytest.raises(ScheduleError, match="each of 2 ranks or for none, but 1 are given"):
        peak_bytes(schedule, Memory(activation_bytes=(1.0,) * 2, weight_bytes=(1.0,) * 2, limit_bytes=(1.0,)))


def test_memory_is_not_negative_and_has_both_parts() -> None:
    with pytest.raises(ScheduleError, match="not negative, but found -1"):
        Memory(activation_bytes=(-1.0,), weight_bytes=(0.0,))
    with pytest.raises(ScheduleError, match="1 activation_bytes and 2 weight_bytes"):
        Memory(activation_bytes=(1.0,), weight_bytes=(0.0, 0.0))
