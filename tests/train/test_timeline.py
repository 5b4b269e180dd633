"""A run leaves the timelines of the steps it was asked for: all ranks on one clock, beside what was predicted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from shardwise.comm.clock import ClockOffset
from shardwise.errors import ConfigError
from shardwise.events import read_events
from shardwise.execute.place import Place
from shardwise.launch import RankContext
from shardwise.schedule import print_row
from shardwise.schedule.recording import Recording, recordings_in
from shardwise.testing import on_ranks
from shardwise.train.run import train_on_rank
from shardwise.train.run_file import TimelineOptions, run_from
from shardwise.train.timeline import pipelines
from train.test_training import job


def test_ranks_whose_clocks_are_skewed_are_drawn_on_one() -> None:
    # the clock of rank 1 is 500 s ahead: what it calls 601 s is 101 s for rank 0
    rows = [[("0F0", 100.0, 101.0), ("0B0", 103.0, 105.0)], [("1F0", 601.5, 602.0), ("1B0", 602.0, 603.0)]]
    offsets = (ClockOffset(), ClockOffset(offset_s=500.0, error_s=1e-4))
    (timeline,) = pipelines(rows, offsets, Place(rank=0, dp=1, pp=2))
    assert [(span.rank, str(span.action), span.start_s, span.end_s) for span in timeline.spans] == [
        (0, "0F0", 0.0, 1.0),
        (0, "0B0", 3.0, 5.0),
        (1, "1F0", 1.5, 2.0),
        (1, "1B0", 2.0, 3.0),
    ]


def test_every_replica_and_shard_has_a_pipeline_of_its_own_ranks() -> None:
    place = Place(rank=0, dp=2, pp=2, tp=2)
    rows = [[(f"{rank // 4}F{rank}", float(rank), rank + 1.0)] for rank in range(8)]  # told by their micro-batch
    found = pipelines(rows, (ClockOffset(),) * 8, place)
    assert [[str(span.action) for span in timeline.spans] for timeline in found] == [
        ["0F0", "1F4"],
        ["0F1", "1F5"],
        ["0F2", "1F6"],
        ["0F3", "1F7"],
    ]
    assert found[3].spans[0].start_s == 3.0  # from the first start of any rank


@on_ranks(4, timeout_s=60.0)
def test_a_run_records_what_each_rank_did_in_the_steps_asked_for(rank: RankContext, tmp_path: Path) -> None:
    described = job(tmp_path, layout="dp=2,pp=2,micro_batches=2", steps=4, timeline={"steps": [2, -1]})
    train_on_rank(rank, described)
    if rank.rank != 0:
        return
    found = recordings_in(tmp_path / "timelines")
    assert list(found) == [2, 4]
    recording = Recording.from_json(found[4].read_text())
    assert len(recording.measured) == 2
    for timeline in recording.measured:
        for position, row in enumerate(recording.schedule.actions):
            spans = [span for span in timeline.spans if span.rank == position]
            assert print_row(span.action for span in spans) == print_row(row)
            assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(spans))
        ends = {str(span.action): span.end_s for span in timeline.spans}
        starts = {str(span.action): span.start_s for span in timeline.spans}
        assert all(ends[f"0F{m}"] <= starts[f"1F{m}"] for m in range(2))  # who reads starts when it has been made
        assert all(ends[f"1B{m}"] <= starts[f"0B{m}"] for m in range(2))
    told = [event for event in read_events(tmp_path / "events") if event.kind == "timeline"]
    assert [event.step for event in told] == [1, 3]
    assert told[1].data["measured_s"] == recording.slowest.seconds
    assert told[1].data["text"] == str(recording)
    assert told[1].data["clock_error_s"] == 0.0  # one host, one clock
    assert told[1].data["sums_s"] == recording.sums_s > 0.0  # two replicas
    assert recording.planned is not None
    assert told[1].data["planned_s"] == recording.planned.seconds


@pytest.mark.parametrize(
    "options, recorded",
    [
        ({}, [5, 9]),
        ({"steps": []}, []),
        ({"steps": [1, 30]}, [1]),
        ({"steps": [-1], "every": 4}, [4, 8, 9]),
    ],
)
def test_steps_are_chosen_by_number_and_by_turn(options: dict[str, object], recorded: list[int]) -> None:
    chosen = TimelineOptions.model_validate(options)
    assert [step + 1 for step in range(9) if chosen.wants(step, 9)] == recorded


@pytest.mark.parametrize("steps", [[0], [-2], ["last"], 5])
def test_a_step_that_there_is_not_is_refused(steps: object) -> None:
    written = {"timeline": {"steps": steps}, "training": {"steps": 9, "global_batch": 1}}
    with pytest.raises(ConfigError, match=r"a list of steps from 1, or -1 for the last, .* write \[5, -1\]"):
        run_from(written)
