"""A trace holds every action where it ran, and an arrow for every value that another rank reads."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from schedule.test_waits import timeline_of
from shardwise.errors import ScheduleError
from shardwise.schedule import Costs, Kind, StageKind, Timeline, chain, generate, simulate
from shardwise.schedule.chrome_trace import to_chrome_trace
from shardwise.schedule.passes import with_offload, with_reductions


def events(timeline: Timeline, phase: str, **options: Any) -> list[dict[str, Any]]:
    return [event for event in json.loads(to_chrome_trace(timeline, **options))["traceEvents"] if event["ph"] == phase]


def test_every_action_is_a_slice_of_its_rank_in_microseconds() -> None:
    slices = events(timeline_of("0F3:10-11", "1F3:11.5-13"), "X")
    assert slices[1] == {
        "ph": "X",
        "name": "F3 stage 1",
        "cat": "F",
        "pid": 1,
        "tid": 0,
        "ts": 1.5e6,
        "dur": 1.5e6,
        "args": {"micro_batch": 3, "stage": 1},
    }
    assert slices[0]["ts"] == 0.0


def test_ranks_and_their_threads_have_names() -> None:
    costs = Costs(compute_seconds=Costs.uniform(2).compute_seconds, activation_seconds={(0, 1): 1.0})
    timeline = simulate(generate("gpipe", num_ranks=2, num_micro_batches=1), costs=costs)
    named = [(e["name"], e["pid"], e["args"].get("name")) for e in events(timeline, "M")]
    assert ("process_name", 1, "rank 1") in named
    assert {name for _, pid, name in named if pid == 0} == {"rank 0", "compute", "to rank 0", "to rank 1"}
    (sent, back) = [e for e in events(timeline, "X") if e["tid"] != 0]
    assert (sent["name"], sent["pid"], sent["ts"], sent["dur"]) == ("activation 0 stage 0 to 1", 0, 1e6, 1e6)
    assert (back["name"], back["pid"]) == ("gradient 0 stage 1 to 0", 1)


@pytest.mark.parametrize("name", ["naive", "gpipe", "1f1b"])
def test_an_arrow_runs_from_inside_the_maker_to_the_start_of_the_reader(name: str) -> None:
    timeline = simulate(generate(name, num_ranks=3, num_micro_batches=4), costs=Costs.uniform(3))
    starts, ends = events(timeline, "s"), events(timeline, "f")
    assert len(starts) == len(ends) == 2 * 2 * 4  # forward and back, over two borders
    slices = events(timeline, "X")
    for start, end in zip(starts, ends, strict=True):
        assert (start["id"], start["name"]) == (end["id"], end["name"])
        assert start["ts"] <= end["ts"]
        assert abs(start["pid"] - end["pid"]) == 1
        inside = [e for e in slices if e["pid"] == start["pid"] and e["ts"] <= start["ts"] < e["ts"] + e["dur"]]
        reader = [e for e in slices if e["pid"] == end["pid"] and e["tid"] == 0 and e["ts"] == end["ts"]]
        assert inside[0]["args"]["micro_batch"] == reader[0]["args"]["micro_batch"]


def test_several_timelines_stand_below_each_other() -> None:
    one = timeline_of("0F0:5-6", "1F0:6-7")
    both: dict[str, Timeline] = {"measured": one, "predicted": timeline_of("0F0:0-2", "1F0:2-4")}
    trace = json.loads(to_chrome_trace(both))["traceEvents"]
    assert {e["pid"]: e["args"]["name"] for e in trace if e["name"] == "process_name"} == {
        0: "measured rank 0",
        1: "measured rank 1",
        2: "predicted rank 0",
        3: "predicted rank 1",
    }
    assert [(e["pid"], e["ts"]) for e in trace if e["ph"] == "X"] == [(0, 0.0), (1, 1e6), (2, 0.0), (3, 2e6)]
    arrows = [(e["id"], e["pid"]) for e in trace if e["ph"] in "sf"]
    assert arrows == [("measured 0", 0), ("measured 0", 1), ("predicted 0", 2), ("predicted 0", 3)]


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "interleaved"])
def test_slices_of_one_thread_do_not_overlap(name: str) -> None:
    schedule = with_offload(with_reductions(generate(name, num_ranks=4, num_micro_batches=6)))
    num_stages = schedule.num_stages
    costs = Costs(
        compute_seconds=Costs.uniform(num_stages).compute_seconds,
        activation_seconds=dict.fromkeys(chain(num_stages), 0.7),
        gradient_seconds=dict.fromkeys(chain(num_stages), 0.4),
        beside_seconds=dict.fromkeys((StageKind.G, Kind.O, Kind.L), (1.3,) * num_stages),
    )
    by_thread: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for each in events(simulate(schedule, costs=costs), "X"):
        by_thread.setdefault((each["pid"], each["tid"]), []).append(each)
    for slices in by_thread.values():
        slices.sort(key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(slices))


def test_times_of_a_plan_without_seconds_are_scaled() -> None:
    assert [e["dur"] for e in events(timeline_of("0F0:0-2"), "X", us_per_unit=1e3)] == [2e3]


def test_edges_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ScheduleError, match="an edge runs from a stage"):
        to_chrome_trace(timeline_of("0F0:0-1"), edges=chain(3))
