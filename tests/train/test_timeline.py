"""A run leaves the timelines of the steps it was asked for: all ranks on one clock, beside what was predicted."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.comm.clock import ClockOffset
from shardwise.errors import ConfigError
from shardwise.events import read_events
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.place import Place
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.schedule import Action, Kind, print_row
from shardwise.schedule.produced import Produced
from shardwise.schedule.recording import Recording, recordings_in
from shardwise.schedule.waits import waits
from shardwise.testing import on_ranks
from shardwise.train.run import train_on_rank
from shardwise.train.run_file import run_from
from shardwise.train.run_tables import TimelineOptions
from shardwise.train.timeline import pipelines, record
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


class Sleeps(torch.autograd.Function):
    """Forward and backward take their time, as if something were computed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_s)
        return gradient, None, None


class Block(nn.Module):
    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seconds = forward_s, backward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleeps.apply(self.linear(x), *self.seconds)  # type: ignore[no-any-return, no-untyped-call]


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(0.03, 0.02), Block(0.05, 0.06)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).square().mean()


@on_ranks(2)
def test_what_a_rank_computes_is_told_apart_from_what_it_waits_for(rank: RankContext) -> None:
    batch = split({"x": torch.ones(4, 4)}, micro_batches=2, replicas=1, weights=lambda _: 1.0)[0]
    program = assemble(
        TwoBlocks(), batch[0].inputs, layout=Layout(pp=2, stages=(("first",), ("second",))), rank=rank.rank
    )
    program.step(batch, step=0)
    result = program.step(batch, step=1)
    edges, schedule = result.edges, program.schedule_of(2)
    recording = record(result, step=1, place=program.place, layout="pp=2", schedule=schedule)
    program.close()
    if recording is None:
        return
    assert edges == {(0, 1)}
    # in ms   rank 0  0F 30 · 0F 30 ·  waits 80  · 0B 20 ·  waits 90   · 0B 20
    #         rank 1  waits 30 · 1F 50 · 1B 60 · 1F 50 · 1B 60 · waits 20;  a busy machine sleeps longer
    costs = recording.costs.compute_seconds
    assert [0.03 <= costs[Kind.F][0] < 0.06, 0.05 <= costs[Kind.F][1] < 0.08] == [True, True]  # not 50 + 30
    assert [0.02 <= costs[Kind.B][0] < 0.10, 0.06 <= costs[Kind.B][1] < 0.12] == [True, True]  # not 20 + 80
    first, second = waits(recording.slowest, edges)
    assert 0.16 <= first.bubble_s < 0.25
    assert 0.045 <= second.bubble_s < 0.12
    assert recording.simulated.seconds == pytest.approx(recording.slowest.seconds, rel=0.2)


@on_ranks(4, timeout_s=60.0)
def test_a_run_records_what_each_rank_did_in_the_steps_asked_for(rank: RankContext, tmp_path: Path) -> None:
    described = job(tmp_path, layout="dp=2,pp=2,micro_batches=2,schedule=zb-v", steps=4, timeline={"steps": [2, -1]})
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
        produced = Produced(timeline, recording.edges)
        for span in timeline.spans:
            assert isinstance(span.action, Action)
            assert all(made.end_s <= span.start_s for made in produced.inputs(span.action)), span
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
