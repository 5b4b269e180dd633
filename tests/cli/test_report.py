"""`shardwise report` and `shardwise plan --calibrate` on the folder of a run that is written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plan.hand_runs import estimate
from shardwise.cli import run_command
from shardwise.describe.catalogue import load_cluster
from shardwise.events import Event, JsonlSink


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of two ranks that took twice as long as predicted, and told nothing of their memory."""
    made = estimate()
    made.write(tmp_path)
    for rank in range(2):
        with JsonlSink(tmp_path / "events", rank=rank) as sink:
            for step in range(5):
                told = {"step_s": 2 * made.predicted.step_s, "sent_bytes": {"pp.send": 4_000_000}}
                sink.emit(Event(kind="step", rank=rank, step=step, seconds=float(step), data=told))
    return tmp_path


def test_the_table_has_the_step_and_says_what_was_not_measured(folder, capsys) -> None:
    assert run_command(["report", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (step,) = [line for line in lines if line.startswith("  a step ")]
    assert step.endswith("-50.0%")
    assert all(line.endswith("not measured") for line in lines if line.startswith(("  rank ", "  F of", "  place")))
    assert sum(line.startswith("  pp.send") and line.endswith("+0.0%") for line in lines) == 2


def test_json_has_null_where_nothing_was_measured(folder, capsys) -> None:
    assert run_command(["report", str(folder), "--json"]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["a step"]["error"] == pytest.approx(-0.5)
    assert rows["rank 1"]["measured"] is None


def test_a_cluster_is_fitted_told_and_written(folder, tmp_path, capsys) -> None:
    out = tmp_path / "fitted.toml"
    assert run_command(["plan", "--calibrate", str(folder), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "efficiency.matmul" in told
    assert "nothing in this run depends on it" in told
    before, after = next(line for line in told.splitlines() if line.startswith(folder.name)).split()[-2:]
    assert before == "-50.0%"
    assert abs(float(after.rstrip("%"))) < 5
    fitted = load_cluster(str(out))
    given = estimate().cluster
    assert fitted.hosts[0].device.efficiency.matmul < given.hosts[0].device.efficiency.matmul
    assert fitted.hosts[0].device.flops_per_s == given.hosts[0].device.flops_per_s


def test_mistakes_are_one_line(folder, tmp_path, capsys) -> None:
    run = tmp_path / "run.toml"
    run.write_text('layout = "pp=1"\n', encoding="utf-8")
    for arguments, told in (
        (["report", str(tmp_path / "nowhere")], "give the folder of a run"),
        (["plan", "--calibrate", str(folder), "--out", str(tmp_path / "no" / "c.toml")], "into a folder that is not"),
        (["plan", str(run), "--out", "c.toml"], "--out is where --calibrate writes"),
        (["plan", "--calibrate", str(folder), "--cluster", "h200x999999"], ""),
    ):
        assert run_command(arguments) == 1
        error = capsys.readouterr().err
        assert told in error
        assert len(error.splitlines()) == 1
