"""Progress: plain lines where there is no terminal, with loss, speed, memory of every rank and what is left."""

from __future__ import annotations

import io

from rich.console import Console

from shardwise.events import Event
from shardwise.train.progress import ProgressSink


def shown(*events: Event, terminal: bool = False, bar: bool = True) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200, highlight=False)
    sink = ProgressSink(console, bar=bar, plain_every_s=0.0)
    for event in events:
        sink.emit(event)
    sink.close()
    return text.getvalue()


def event(kind: str, step: int | None = None, **data: object) -> Event:
    return Event(kind=kind, rank=0, seconds=0.0, step=step, data=data)


START = event("start", steps=10, first_step=4, layout="dp=2", num_parameters=5_000_000, ready_s=3.0, data="7 samples")
STEP = event("step", 4, loss=3.25, weight=1000.0, step_s=2.0, memory_bytes=[2**20, 2**21])


def test_a_step_is_one_line_with_everything_that_is_asked_for() -> None:
    lines = shown(START, STEP).splitlines()
    assert lines[0] == "data: 7 samples"
    assert lines[1] == "training 5 M parameters for 10 steps on dp=2, resumed after step 4; ready after 3 s"
    assert lines[2] == "step 5/10  loss 3.2500  500 tokens/s  memory 1 MiB 2 MiB  ETA 10 s"


def test_speed_is_told_in_what_the_task_counts_and_in_samples_where_it_does_not_say() -> None:
    def told(**data: object) -> str:
        return shown(event("start", **{**START.data, **data}), STEP).splitlines()[2]

    assert "3.2500  500 images/s  memory" in told(counts="images", global_batch=32)
    assert "3.2500  16 samples/s  memory" in told(counts="samples", global_batch=32)


def test_evaluations_and_checkpoints_are_told() -> None:
    text = shown(
        START,
        event("evaluation", 5, loss=2.5, weight=10.0, perplexity=12.18),
        event("checkpoint", 5, folder="there", step_s=0.5),
        event("end", first_loss=4.0, last_loss=2.0, train_s=61.0),
        event("a kind of another version"),
    )
    assert "evaluation after step 6: held-out loss 2.5000  perplexity 12.18" in text
    assert "checkpoint of step 6 in there (500 ms)" in text
    assert "loss 4.0000 -> 2.0000 (mean of the last 10 steps) in 1 min 01 s" in text


def test_figures_of_a_task_and_its_report_are_told() -> None:
    told = {"loss": 0.5, "weight": 9.0, "samples": 3, "figures": {"f1": 0.71234}, "report": "PER 0.7\nLOC 0.8"}
    lines = shown(event("evaluation", 5, **told)).splitlines()
    assert lines == ["evaluation after step 6: held-out loss 0.5000  f1 0.7123", "PER 0.7", "LOC 0.8"]


def test_what_a_rank_sends_in_a_step_is_told_at_the_end_by_axis() -> None:
    sent = {"dp.all_reduce": 0, "pp.send": 2**20, "tp.all_reduce": 3 * 2**20}
    step = event("step", 5, loss=3.0, weight=1.0, step_s=1.0, memory_bytes=[2**20], sent_bytes=sent)
    end = event("end", first_loss=4.0, last_loss=2.0, train_s=61.0)
    assert shown(START, step, end).splitlines()[-1] == "rank 0 sends in a step: pp.send 1 MiB, tp.all_reduce 3 MiB"
    assert "sends" not in shown(START, STEP, end)


def test_the_recorded_timeline_is_told_at_the_end_where_there_is_a_pipeline() -> None:
    end = event("end", first_loss=4.0, last_loss=2.0, train_s=61.0)
    recorded = event("timeline", 8, text="step 9 took 2 s", num_ranks=2)
    assert shown(START, STEP, recorded, end).splitlines()[-1] == "step 9 took 2 s"
    assert "took" not in shown(START, STEP, event("timeline", 8, text="step 9 took 2 s", num_ranks=1), end)


def test_on_a_terminal_there_is_a_bar_and_it_is_taken_off() -> None:
    assert "step 5/10" in shown(START, STEP, terminal=True)


def test_on_a_launchers_terminal_there_are_plain_lines() -> None:
    shown_there = shown(START, STEP, terminal=True, bar=False)
    assert shown_there.splitlines()[2] == "step 5/10  loss 3.2500  500 tokens/s  memory 1 MiB 2 MiB  ETA 10 s"
    assert "\x1b" not in shown_there
