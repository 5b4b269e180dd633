"""The contenders of the benchmark of data parallelism train as one process does, and its figures are the worse ones."""

from __future__ import annotations

import pytest

from benchmarks.data import run
from benchmarks.data.contenders import GROUPS, OPTIONAL
from benchmarks.data.ranks import expected_losses, timed_steps
from benchmarks.data.setting import SETTINGS
from shardwise.launch import RankContext
from shardwise.testing import on_ranks


@pytest.mark.parametrize("group", [pytest.param("dp2", marks=pytest.mark.slow), "zero3"])
@on_ranks(2)
def test_contenders_take_the_steps_of_one_process(rank: RankContext, group: str) -> None:
    names = [name for name in GROUPS[group] if name not in OPTIONAL]
    setting = SETTINGS["tiny"]
    seconds = timed_steps(rank, names, setting, 2, expected_losses(rank, setting))
    assert {name: len(steps) for name, steps in seconds.items()} == dict.fromkeys(names, 2)


@on_ranks(2)
def test_a_contender_with_other_losses_is_an_error(rank: RankContext) -> None:
    setting = SETTINGS["tiny"]
    expected = expected_losses(rank, setting)
    with pytest.raises(AssertionError, match="shardwise dp2: loss"):
        timed_steps(rank, ["shardwise dp2"], setting, 1, [*expected[:-1], expected[-1] * 1.001])


def test_figures_are_the_worst_of_settings_and_ranks() -> None:
    timings = {
        "a": {"dp2": {"shardwise dp2": [1.0, 1.0, 9.0], "ddp": [2.0, 2.0, 9.0]}},
        "b": {"dp2": {"shardwise dp2": [3.0], "ddp": [4.0]}},
    }
    memory = {"shardwise zero3": [(10, 0, 9), (30, 0, 9)], "fsdp2 zero3": [(20, 0, 12), (20, 0, 18)]}
    figures = run._figures(timings, memory, [("shardwise zero3", "fsdp2 zero3")])
    assert figures == {
        "dp2_vs_ddp": 0.75,
        "peak_memory_zero3": 1.5,
        "proportional_memory_zero3": 0.75,
        "peak_memory_vs_fsdp2": 1.5,
    }
