"""`shardwise draw` draws schedules by name, from files and as a run measured them: as text, picture and trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from schedule.test_recording import MEASURED, recording
from schedule.test_waits import timeline_of
from shardwise.cli import run_command
from shardwise.cli.draw_costs import costs_of
from shardwise.schedule import Kind, Schedule, generate
from shardwise.schedule.memory import Memory, peak_bytes


def test_a_schedule_is_drawn_with_what_it_needs(capsys) -> None:
    assert run_command(["draw", "1f1b", "--ranks", "2", "--micro-batches", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rank 0  0>1>....0<<<2>1<<<..2<<<",
        "rank 1  ..0>0<<<1>1<<<2>2<<<....",
        "",
        "3> forward of micro-batch 3   3< backward of micro-batch 3   . idle",
        "2 ranks, 12 s, bubble 25.0 %",
        "micro-batches in flight on rank 0, 1, ..., at most: 2, 1",
        "ideal: 9, what the busiest rank computes",
    ]


def test_stages_may_be_uneven_and_transfers_take_time(capsys) -> None:
    arguments = ["--ranks", "2", "--micro-batches", "1", "--forward", "1,2", "--backward", "1,3", "--transfer", "1"]
    assert run_command(["draw", "gpipe", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["rank 0  0>..............0<", "rank 1  ....0>>>0<<<<<...."]


def test_a_whole_backward_is_both_halves_and_the_other_way_round() -> None:
    by_halves = costs_of(2, forward="1", input_gradient="2,3", weight_gradient="4").compute_seconds
    assert (by_halves[Kind.I], by_halves[Kind.W], by_halves[Kind.B]) == ((2, 3), (4, 4), (6, 7))
    whole = costs_of(2, forward="1", backward="3").compute_seconds
    assert (whole[Kind.I], whole[Kind.W], whole[Kind.B]) == ((1.5, 1.5), (1.5, 1.5), (3, 3))
    assert costs_of(1).compute_seconds[Kind.B] == (2.0,)


def test_a_picture_a_trace_and_the_schedule_itself_are_written(tmp_path: Path, capsys) -> None:
    svg, chrome = tmp_path / "new" / "picture.svg", tmp_path / "trace.json"
    written, csv = tmp_path / "schedule.json", tmp_path / "schedule.csv"
    files = ["--svg", str(svg), "--chrome", str(chrome), "--json", str(written), "--csv", str(csv)]
    assert run_command(["draw", "1f1b", "--ranks", "2", "--micro-batches", "3", *files]) == 0
    assert "<title>1f1b: 2 stages on 2 ranks, 3 micro-batches: 12, bubble 25.0 %</title>" in svg.read_text()
    assert len(json.loads(chrome.read_text())["traceEvents"]) > 12
    assert Schedule.from_json(written.read_text()) == generate("1f1b", num_ranks=2, num_micro_batches=3)
    drawn = capsys.readouterr().out
    for path in (written, csv):
        assert run_command(["draw", str(path)]) == 0
        assert capsys.readouterr().out == drawn


def test_passes_add_recomputation_offloading_and_sums_of_gradients(tmp_path: Path, capsys) -> None:
    picture = tmp_path / "picture.svg"
    arguments = ["--ranks", "2", "--micro-batches", "6", "--reduce", "1.5", "--offload", "0.25", "--svg", str(picture)]
    assert run_command(["draw", "gpipe", *arguments, "--recompute"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("5^5<<<.......")
    assert "3^ forward again of micro-batch 3" in lines[3]
    assert all(f">{name}</text>" in picture.read_text() for name in ("sum of gradients", "offload", "load"))


def test_a_schedule_is_searched_for_within_a_memory_and_can_be_run(tmp_path: Path, capsys) -> None:
    written = tmp_path / "found.json"
    arguments = ["--ranks", "2", "--micro-batches", "4", "--chunks", "2", "--transfer", "0.3", "--forward", "1,2,1,1"]
    assert run_command(["draw", "searched", *arguments, "--memory", "2", "--json", str(written)]) == 0
    assert ", at best " in capsys.readouterr().out.splitlines()[-1]
    found = Schedule.from_json(written.read_text())
    memory = Memory(activation_bytes=(0.5,) * 4, weight_bytes=(0.5,) * 4)
    assert max(peak_bytes(found, memory)) <= 2
    assert (found.num_ranks, found.num_stages, found.num_micro_batches) == (2, 4, 4)


def test_a_run_is_drawn_measured_above_predicted(tmp_path: Path, capsys) -> None:
    recording(step=4).write(tmp_path / "timelines")
    recording(timeline_of("0F0:0-1 0B0:2-4", "1F0:1-1.5 1B0:1.5-2"), step=9).write(tmp_path / "timelines")
    svg, chrome = tmp_path / "picture.svg", tmp_path / "trace.json"
    arguments = ["--step", "5", "--width", "13", "--svg", str(svg), "--chrome", str(chrome)]
    assert run_command(["draw", str(tmp_path), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "pp=2: 1f1b: 2 stages on 2 ranks, 1 micro-batches",
        "",
        "1f1b, step 5, measured: 6.5 s, bubble 57.7 %",
        "rank 0  0>.......0<<<",
    ]
    assert "predicted from the costs of this step: 6.5 s, bubble 57.7 %" in lines
    assert "rank 0      46.2 %             46.2 %                  7.7 %" in lines
    assert lines[-1].startswith("step 5 took 6.5 s")
    assert "measured: 6.5 s" in svg.read_text()
    assert '"F0 stage 1"' in chrome.read_text()
    assert run_command(["draw", str(tmp_path)]) == 0
    assert "step 10, measured: 4 s" in capsys.readouterr().out


def test_other_schedules_are_drawn_with_the_costs_that_a_run_measured(tmp_path: Path, capsys) -> None:
    recording().write(tmp_path / "timelines")  # F 1 and 1 s, B 2 and 1.5 s, half a second there and back
    measured = ["--costs", str(tmp_path), "--micro-batches", "2"]
    assert run_command(["draw", "zb-h1", *measured, "--chrome", str(tmp_path / "trace.json")]) == 0
    assert "2 ranks, 7.75 s" in capsys.readouterr().out
    slices = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    lasts = {e["name"]: e["dur"] for e in slices}
    assert (lasts["F1 stage 0"], lasts["I1 stage 1"], lasts["W1 stage 1"]) == (1e6, 0.75e6, 0.75e6)
    assert run_command(["draw", "searched", *measured]) == 0
    assert "searched: 2 stages on 2 ranks, 2 micro-batches" in capsys.readouterr().out
    assert run_command(["draw", "zb-v", *measured]) == 1
    assert "costs of a run are those of its 2 stages, but the schedule has 4" in capsys.readouterr().err


def test_steps_that_are_not_drained_are_drawn_one_after_another(capsys) -> None:
    assert run_command(["draw", "pipedream-2bw", "--ranks", "2", "--micro-batches", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "rank 1  ..0>0<<<1>1<<<2>2<<<3>3<<<4>4<<<5>5<<<...."


def test_of_several_pipelines_the_slowest_is_drawn_and_all_are_traced(tmp_path: Path, capsys) -> None:
    slow = timeline_of("0F0:0-1 0B0:8-10", "1F0:1-2 1B0:2-4")
    recording(MEASURED, slow).write(tmp_path / "timelines")
    assert run_command(["draw", str(tmp_path), "--chrome", str(tmp_path / "trace.json")]) == 0
    told = capsys.readouterr().out
    assert "step 5, measured: 10 s" in told
    assert "drawn is the slowest of 2 pipelines, which took 6.5, 10 s" in told
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        f"{name} rank {rank}" for name in ("pipeline 0", "pipeline 1", "predicted") for rank in range(2)
    ]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["1f1b", "--stages", "3"], "write --ranks 3, and --chunks N for N stages a rank"),
        (["1f1b", "--chunks", "2"], "the schedule 1f1b is made for 1 stages a rank, but chunks=2"),
        (["1f1b", "--forward", "1,2,3"], "--forward has one number, or one a stage, of which there are 4, but got 3"),
        (["1f1b", "--transfer", "1,2"], "--transfer has one number, or one between two stages, of which there are 3"),
        (["1f1b", "--forward", "fast"], '--forward is a number or several with commas, but got "fast"'),
        (["1f1b", "--forward", "-1"], "costs are finite and not negative"),
        (["1f1b", "--memory", "3"], "1f1b is given; drop --memory 3"),
        (["1f1b", "--step", "3"], "steps are those of a run, but 1f1b is a schedule"),
        (["nowhere.json"], "nowhere.json: No such file"),
        (["."], "holds none; train with timeline.every or timeline.steps"),
    ],
)
def test_a_wrong_drawing_is_refused_with_what_to_write(arguments, told, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["draw", *arguments]) == 1
    assert told in capsys.readouterr().err


def test_a_step_that_was_not_recorded_is_refused(tmp_path: Path, capsys) -> None:
    recording(step=4).write(tmp_path / "timelines")
    assert run_command(["draw", str(tmp_path), "--step", "7"]) == 1
    assert "step 7 was not; those of" in capsys.readouterr().err
