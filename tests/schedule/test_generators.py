"""Every generator in the registry works for every stage graph."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule.strategies import graphs
from shardwise.errors import ScheduleError
from shardwise.schedule import GENERATORS, Costs, Edges, check, draw, forward_only, generate, simulate

names = st.sampled_from(sorted(GENERATORS))
Y_SHAPED = frozenset({(0, 2), (1, 2)})  # two towers, one head


@given(names, graphs(max_stages=6), st.integers(1, 9))
def test_what_is_generated_passes_the_checker_on_any_graph(
    name: str, graph: tuple[int, Edges], num_micro_batches: int
) -> None:
    num_stages, edges = graph
    schedule = generate(name, num_ranks=num_stages, num_micro_batches=num_micro_batches)
    assert schedule.name == name
    check(schedule, edges)
    assert check(forward_only(schedule), edges).peak_per_rank == (0,) * num_stages


def test_two_towers_run_side_by_side() -> None:
    schedule = generate("1f1b", num_ranks=3, num_micro_batches=3)
    check(schedule, Y_SHAPED)
    drawing = draw(simulate(schedule, Y_SHAPED, costs=Costs.uniform(3)))
    assert drawing.partition("\n\n")[0] == (
        "rank 0  0>1>2>..0<<<..1<<<..2<<<\nrank 1  0>1>....0<<<2>1<<<..2<<<\nrank 2  ..0>0<<<1>1<<<2>2<<<...."
    )


def test_a_name_that_is_not_in_the_registry_is_refused_with_the_names() -> None:
    with pytest.raises(ScheduleError, match='one of naive, gpipe, 1f1b, but got "zb"'):
        generate("zb", num_ranks=2, num_micro_batches=2)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("num_stages, num_micro_batches", [(0, 1), (1, 0), (-1, 1)])
def test_counts_below_1_are_refused(name: str, num_stages: int, num_micro_batches: int) -> None:
    with pytest.raises(ScheduleError, match="at least 1 stage and 1 micro-batch"):
        generate(name, num_ranks=num_stages, num_micro_batches=num_micro_batches)
