"""Small pipelines that stand for large ones: held to the simulator."""

from __future__ import annotations

import pytest

from shardwise.plan.alike_pipelines import alive_of, fill_of
from shardwise.plan.in_flight import kept_micro_batches
from shardwise.plan.stage_work import StageWork
from shardwise.schedule import Costs, Kind, generate, seconds_of

SPLIT = ("zb-v", "zb-v-half", "zb-v-min", "dualpipe-v")


def simulated(name: str, ranks: int, count: int, forward: float, weight: float) -> float:
    """Seconds of equal stages whose ranks take one for a micro-batch."""
    stages = 2 * ranks
    f, w = forward / 2, weight / 2
    kinds = {Kind.F: f, Kind.B: 0.5 - f, Kind.I: 0.5 - f - w, Kind.W: w}
    costs = Costs(compute_seconds={kind: (seconds,) * stages for kind, seconds in kinds.items()})
    return seconds_of(generate(name, num_ranks=ranks, num_micro_batches=count, chunks=2), costs)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize(("ranks", "count"), [(4, 6), (8, 32), (16, 16), (16, 64), (24, 48)])
@pytest.mark.parametrize(("forward", "weight"), [(1 / 3, 1 / 3), (0.28, 0.3)])
def test_steps_are_those_of_the_simulator(name, ranks, count, forward, weight) -> None:
    fill = fill_of(name, num_ranks=ranks, chunks=2, num_micro_batches=count, forward=forward, weight=weight, send=0.0)
    exact = simulated(name, ranks, count, forward, weight)
    assert count + fill == pytest.approx(exact, rel=0.005 if ranks <= 8 else 0.05)


@pytest.mark.parametrize(("name", "chunks"), [("zb-v", 2), ("zb-v-half", 2), ("interleaved", 4), ("zb-h2", 1)])
@pytest.mark.parametrize(("ranks", "count"), [(4, 9), (8, 24), (16, 48), (32, 96)])
def test_ranks_keep_what_the_schedule_keeps(name, chunks, ranks, count) -> None:
    works = [
        StageWork(stage=s, parameters=0, trained=0, kernels=(), saved_bytes=1.0, weight_bytes=0.5)
        for s in range(ranks * chunks)
    ]
    made = generate(name, num_ranks=ranks, num_micro_batches=count, chunks=chunks)
    exact = kept_micro_batches(made, works)
    found = alive_of(name, num_ranks=ranks, chunks=chunks, num_micro_batches=count, waiting=0.5)
    fullest = [max(sum(kept[s] for s in own) for own in made.ranks) for kept in (exact, found)]
    assert fullest[1] == pytest.approx(fullest[0], rel=0.02 if ranks <= 8 else 0.05)
