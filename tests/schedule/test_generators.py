"""Every generator in the registry works for every stage graph."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.errors import ScheduleError
from shardwise.schedule import (
    GENERATORS,
    Action,
    Costs,
    Edges,
    Kind,
    check,
    draw,
    forward_only,
    generate,
    placement,
    simulate,
    with_transfers,
)

names = st.sampled_from(sorted(GENERATORS))
Y_SHAPED = frozenset({(0, 2), (1, 2)})  # two towers, one head


@st.composite
def pipelines(draw_: st.DrawFn) -> tuple[str, int, int, Edges]:
    """A name, ranks, stages a rank, and any graph of that many stages."""
    name, num_ranks = draw_(names), draw_(st.integers(1, 5))
    fewest, most = GENERATORS[name].chunks
    chunks = draw_(st.integers(fewest, most or 3))
    possible = [(s, t) for t in range(num_ranks * chunks) for s in range(t)]
    return (
        name,
        num_ranks,
        chunks,
        frozenset(draw_(st.lists(st.sampled_from(possible), unique=True)) if possible else []),
    )


@settings(deadline=2000)
@given(pipelines(), st.integers(1, 13), st.integers(0, 3))
def test_what_is_generated_passes_the_checker_on_any_graph(
    pipeline: tuple[str, int, int, Edges], num_micro_batches: int, prefetch: int
) -> None:
    name, num_ranks, chunks, edges = pipeline
    schedule = generate(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=chunks)
    assert schedule.name == name
    assert schedule.ranks == placement(name, num_ranks=num_ranks, chunks=chunks)
    check(schedule, edges, rows=with_transfers(schedule, edges, prefetch=prefetch))
    assert check(forward_only(schedule), edges).peak_per_rank == (0,) * num_ranks


@pytest.mark.parametrize("name", GENERATORS)
def test_none_deadlocks_on_a_chain_however_many_ranks_and_micro_batches_there_are(name: str) -> None:
    fewest, most = GENERATORS[name].chunks
    for num_ranks, m, chunks in product(range(1, 6), range(1, 12), range(fewest, (most or 3) + 1)):
        check(generate(name, num_ranks=num_ranks, num_micro_batches=m, chunks=chunks))


@settings(deadline=2000)
@given(pipelines(), st.integers(1, 13))
def test_every_stage_takes_the_micro_batches_in_order_so_that_gradients_add_up_in_one_order(
    pipeline: tuple[str, int, int, Edges], num_micro_batches: int
) -> None:
    name, num_ranks, chunks, _ = pipeline
    schedule = generate(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=chunks)
    for rank, stages in enumerate(schedule.ranks):
        actions = [action for action in schedule.actions[rank] if isinstance(action, Action)]
        for stage, kinds in product(stages, ((Kind.F,), (Kind.B, Kind.I), (Kind.B, Kind.W))):
            order = [a.micro_batch for a in actions if a.stage == stage and a.kind in kinds]
            assert order == list(range(num_micro_batches))


@pytest.mark.parametrize("name", GENERATORS)
def test_every_file_says_where_it_is_from_and_what_it_costs(name: str) -> None:
    about = GENERATORS[name].about
    assert "arXiv:" in about.source
    assert all((about.title, about.bubble, about.memory, about.traffic))


def test_two_towers_run_side_by_side() -> None:
    schedule = generate("1f1b", num_ranks=3, num_micro_batches=3)
    check(schedule, Y_SHAPED)
    drawing = draw(simulate(schedule, Y_SHAPED, costs=Costs.uniform(3)))
    assert drawing.partition("\n\n")[0] == (
        "rank 0  0>1>2>..0<<<..1<<<..2<<<\nrank 1  0>1>....0<<<2>1<<<..2<<<\nrank 2  ..0>0<<<1>1<<<2>2<<<...."
    )


def test_a_name_that_is_not_in_the_registry_is_refused_with_the_names() -> None:
    with pytest.raises(ScheduleError, match='one of naive, gpipe, 1f1b, interleaved, .*, but got "zb"'):
        generate("zb", num_ranks=2, num_micro_batches=2)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("num_stages, num_micro_batches", [(0, 1), (1, 0), (-1, 1)])
def test_counts_below_1_are_refused(name: str, num_stages: int, num_micro_batches: int) -> None:
    with pytest.raises(ScheduleError, match="at least 1 stage and 1 micro-batch"):
        generate(name, num_ranks=num_stages, num_micro_batches=num_micro_batches)
