"""`layout = "auto"` on the command line: searched, measured on the way, kept beside the run, resumed and verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.test_train import TINY, losses
from shardwise.events import read_events
from shardwise.layout import Layout

RUN = """
layout = "auto"
cluster = "local2"
[model]
factory = "tiny:Tiny"
[task]
kind = "random_tokens"
[training]
steps = 14
global_batch = 8
[auto]
measure = 2
steps = 1
within = 100.0
[checkpoint]
every = 14
"""


def command(verb: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    told = [sys.executable, "-m", "shardwise.cli", verb, "run.toml", *arguments]
    return subprocess.run(told, cwd=folder, capture_output=True, text=True, timeout=150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    (folder / "tiny.py").write_text(TINY)
    (folder / "run.toml").write_text(RUN)
    return folder


def test_a_layout_is_searched_measured_on_the_way_and_kept_beside_the_run(folder: Path) -> None:
    ended = command("train", folder)
    assert ended.returncode == 0, ended.stderr
    assert "layout: " in ended.stdout
    assert "measured on the way, 1 steps each: " in ended.stdout
    assert "relayout behind step 3: " in ended.stdout
    kept = json.loads((folder / "runs" / "run" / "layout.json").read_text())
    assert kept["measured"]
    assert Layout.from_dict(kept["layout"]).world_size == 2
    measured = [e for e in read_events(folder / "runs" / "run" / "events") if e.kind == "measured"]
    assert {str(e.data["kept"]) for e in measured} == {str(Layout.from_dict(kept["layout"]))}
    assert (folder / "runs" / "run" / "plan.txt").read_text().startswith("layout: ")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_was_kept_is_resumed_and_verified_and_the_curve_is_one_devices(folder: Path) -> None:
    if not (folder / "runs").exists():
        test_a_layout_is_searched_measured_on_the_way_and_kept_beside_the_run(folder)
    resumed = command("train", folder, "--resume", "--set", "training.steps=16")
    assert resumed.returncode == 0, resumed.stderr
    assert "relayout" not in resumed.stdout  # it goes on where the first one stayed
    alone = command("train", folder, "--set", "layout=dp=1", "--set", "training.steps=14", "--set", "folder=alone")
    assert alone.returncode == 0, alone.stderr
    one, own = losses(folder / "alone"), losses(folder / "runs" / "run")
    assert sorted(own) == list(range(16))
    assert max(abs(own[step] - one[step]) / one[step] for step in one) <= 1e-5
    verified = command("verify", folder)
    assert verified.returncode == 0, verified.stdout + verified.stderr
