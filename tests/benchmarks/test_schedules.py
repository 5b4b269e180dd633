"""The contenders of the schedule benchmark compute the same; its figures are quotients within a round."""

from __future__ import annotations

import pytest

from benchmarks.pipeline.model import Shape
from benchmarks.schedules import emulated, overhead, real
from benchmarks.schedules.contenders import HALVES, ONE
from shardwise.launch import RankContext
from shardwise.schedule import Kind, generate
from shardwise.testing import on_ranks

SMALL = Shape(name="small", hidden=16, heads=2, width=32, sequence=4, blocks=4, vocabulary=32, micro_batches=4)


@on_ranks(2)
def test_contenders_have_the_gradients_of_one_process(rank: RankContext) -> None:
    names = (ONE, HALVES, "shardwise 1f1b", "torch 1f1b", "torch interleaved", "torch zb-v")
    seconds = real.timed_rounds(rank, names, SMALL, 2)  # raises where a loss or a gradient differs
    assert {name: len(steps) for name, steps in seconds.items()} == dict.fromkeys(names, 2)


@on_ranks(2)
def test_both_executors_run_the_same_actions(rank: RankContext) -> None:
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=4)
    found = overhead.measured(rank, schedule, 2)  # raises where gradients differ
    assert all(len(steps) == 2 for steps in (*found.wall_s.values(), *found.cpu_s.values()))


@on_ranks(2)
def test_an_emulated_step_takes_as_long_as_its_actions_sleep(rank: RankContext) -> None:
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=4)
    case = emulated.Case(even=True, schedule=schedule, costs=emulated.costs_of(2, even=True))
    ran = emulated.run_case(rank, case, 1)
    assert case.simulated_s == pytest.approx(0.15)
    least_s = 0.15 if rank.rank == 0 else 0.12  # rank 0 begins and ends; the other has its own actions at least
    assert ran.ends[0] - ran.starts[0] >= least_s


def test_efficiency_is_of_two_processes_and_ratios_are_of_the_same_schedule() -> None:
    seconds = {
        ONE: [4.0, 4.0, 6.0],
        HALVES: [2.5, 2.0, 3.0],
        "shardwise 1f1b": [2.5, 2.5, 3.0],
        "torch 1f1b": [2.5, 5.0, 4.0],
        "shardwise interleaved-zb": [2.0, 2.5, 3.0],
        "torch interleaved-zb": [4.0, 2.2, 3.6],
    }
    found = real.figures(seconds)
    assert found["vs_torch"] == {"1f1b": 0.75, "interleaved-zb": 0.8333}
    assert (found["best_schedule"], found["best_efficiency"], found["ceiling"]) == ("interleaved-zb", 1.0, 1.0)
    assert (found["best_peer"], found["best_peer_efficiency"]) == ("torch interleaved-zb", 0.8333)


def test_uneven_stages_sleep_between_5_and_20_ms() -> None:
    costs = emulated.costs_of(16, even=False)
    seconds = [s for kind in (Kind.F, Kind.I, Kind.W, Kind.B) for s in costs.compute_seconds[kind]]
    assert min(seconds) >= 5e-3
    assert max(seconds) <= 20e-3
    assert len(set(costs.compute_seconds[Kind.F])) == 16
