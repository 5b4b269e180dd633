"""A rank may own any stages: the search decides which, and is never slower than a generator on as many stages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.searches import costs_of
from shardwise.errors import ScheduleError
from shardwise.schedule import Costs, Kind, Placement, chain, check, seconds_of
from shardwise.schedule.memory import Memory, fits, peak_bytes
from shardwise.schedule.placement import stages_of_ranks
from shardwise.schedule.search import textbooks
from shardwise.schedule.search_placements import on_devices, search_placements


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_it_is_never_slower_than_a_generator_with_as_many_stages(data: st.DataObject) -> None:
    num_ranks, chunks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    num_stages, num_micro_batches = num_ranks * chunks, data.draw(st.integers(1, 4))
    costs = data.draw(costs_of(num_stages, num_micro_batches, chain(num_stages), free=False))
    speeds = data.draw(st.lists(st.sampled_from((0.5, 1.0, 2.0)), min_size=num_ranks, max_size=num_ranks))
    limits = (2.0 * chunks,) * num_ranks
    memory = Memory(activation_bytes=(1.0,) * num_stages, weight_bytes=(0.5,) * num_stages, limit_bytes=limits)
    found = search_placements(
        costs,
        num_micro_batches=num_micro_batches,
        num_ranks=num_ranks,
        speeds=speeds,
        memory=memory,
        seconds=0.1,
    )
    check(found.schedule)
    assert fits(found.schedule, memory)
    theirs = on_devices(costs, found.schedule.ranks, speeds)
    assert seconds_of(found.schedule, theirs) == pytest.approx(found.seconds, rel=1e-12)
    for placement in Placement:
        ranks = stages_of_ranks(placement, num_ranks=num_ranks, chunks=chunks)
        for schedule in textbooks(ranks, num_micro_batches):
            if fits(schedule, memory):
                assert found.seconds <= seconds_of(schedule, on_devices(costs, ranks, speeds)) * (1 + 1e-9)


def test_a_device_half_as_fast_gets_fewer_stages() -> None:
    found = search_placements(Costs.uniform(6), num_micro_batches=12, num_ranks=2, speeds=(1.0, 0.5), seconds=0.3)
    assert [len(stages) for stages in found.schedule.ranks] == [4, 2]
    assert found.best_textbook is not None
    assert found.seconds < 0.75 * found.best_textbook[1]  # three stages each: half as slow again


def test_a_rank_with_a_heavy_stage_gets_little_else() -> None:
    heavy = (1.0, 1.0, 1.0, 1.0, 1.0, 5.0)
    costs = Costs(compute_seconds={Kind.F: heavy, Kind.I: heavy, Kind.W: heavy, Kind.B: tuple(2 * x for x in heavy)})
    found = search_placements(costs, num_micro_batches=12, num_ranks=2, seconds=0.3)
    assert (5,) in found.schedule.ranks


def test_a_placement_that_has_room_is_found_where_those_of_generators_have_none() -> None:
    memory = Memory(activation_bytes=(1.0, 1.0, 1.0, 3.0), weight_bytes=(0.0,) * 4, limit_bytes=(3.0, 3.0))
    found = search_placements(Costs.uniform(4), num_micro_batches=2, num_ranks=2, memory=memory, seconds=0.2)
    assert (3,) in found.schedule.ranks
    assert found.best_textbook is None


def test_what_stages_hold_throughout_counts_against_the_limits() -> None:
    memory = Memory(activation_bytes=(1.0,) * 4, weight_bytes=(1.0,) * 4, limit_bytes=(12.0, 12.0))
    heavy = search_placements(
        Costs.uniform(4),
        num_micro_batches=6,
        num_ranks=2,
        memory=memory,
        held_bytes=(10.0, 1.0, 1.0, 1.0),
        seconds=0.2,
    )
    assert (0,) in heavy.schedule.ranks  # 10 and 2 for two micro-batches; with another stage none would fit
    assert peak_bytes(heavy.schedule, memory)[heavy.schedule.owners[0]] <= 2


def test_no_room_anywhere_is_refused() -> None:
    memory = Memory(activation_bytes=(1.0, 4.0), weight_bytes=(0.0,) * 2, limit_bytes=(3.0, 3.0))
    with pytest.raises(ScheduleError, match="2 stages on 2 ranks has room for one micro-batch"):
        search_placements(Costs.uniform(2), num_micro_batches=2, num_ranks=2, memory=memory, seconds=0.1)


def test_there_are_no_more_ranks_than_stages_and_every_rank_has_a_speed() -> None:
    with pytest.raises(ScheduleError, match="3 ranks and 2 stages"):
        search_placements(Costs.uniform(2), num_micro_batches=2, num_ranks=3)
    with pytest.raises(ScheduleError, match=r"each of 2 ranks has a speed above 0, but speeds are \[1.0, 0.0\]"):
        search_placements(Costs.uniform(2), num_micro_batches=2, num_ranks=2, speeds=(1.0, 0.0))


def test_every_kind_needs_a_cost() -> None:
    costs = Costs(compute_seconds={Kind.F: (1.0,) * 3, Kind.B: (2.0,) * 3})
    with pytest.raises(ScheduleError, match="F, I, W and B cost on each of 3 stages, but I has 0"):
        search_placements(costs, num_micro_batches=2, num_ranks=2)


def test_a_seed_gives_one_placement_and_schedule() -> None:
    def once() -> str:
        found = search_placements(
            Costs.uniform(6), num_micro_batches=4, num_ranks=3, speeds=(1.0, 0.5, 1.0), seconds=0.5, seed=4
        )
        return found.schedule.to_json()

    assert once() == once()
