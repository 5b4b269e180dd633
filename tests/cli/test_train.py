"""`shardwise train` as processes: it is killed and resumed, it runs under torchrun, a script calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwise.events import Event, read_events

# A model of its own in the folder that the command is called from; `pause_s` makes a run last.
TINY = """
import time
from torch import nn

class Tiny(nn.Module):
    def __init__(self, pause_s=0.0):
        super().__init__()
        self.pause_s = pause_s
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), nn.Tanh()) for _ in range(3)))
    def forward(self, input_ids, labels):
        time.sleep(self.pause_s)
        return self.head(self.blocks(self.embed(input_ids)))
"""
RUN = """
layout = "dp=2,pp=2"
[model]
factory = "tiny:Tiny"
[task]
kind = "random_tokens"
[training]
steps = 24
global_batch = 8
[checkpoint]
every = 3
"""
COMMAND = [sys.executable, "-m", "shardwise.cli", "train", "run.toml"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss as told by rank 0; where a step was done twice, the later one."""
    steps = [e for e in read_events(folder / "events") if e.kind == "step" and e.rank == 0]
    return {int(str(e.step)): float(str(e.data["loss"])) for e in steps}


def events(folder: Path) -> list[Event]:
    try:
        return list(read_events(folder / "events"))
    except Exception:  # not there yet
        return []


def finished(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=90)


@pytest.mark.parametrize("compared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killing_a_rank_ends_the_command_in_seconds_and_resume_continues_the_curve(folder, compared: bool) -> None:
    two = ["--set", "layout=pp=2"]
    slow = ["--set", "model.options.pause_s=0.1", "--set", "folder=killed"]
    command = subprocess.Popen(
        [*COMMAND, *two, *slow], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        started = wait_for_steps(folder / "killed", 5)
        os.kill(started[1], signal.SIGKILL)
        killed_s = time.monotonic()
        _, told = command.communicate(timeout=15)
        took_s = time.monotonic() - killed_s
    finally:
        command.kill()
        command.wait()
    assert command.returncode == 1
    assert took_s < 15
    assert "rank 1 of 2 was killed by signal 9 (SIGKILL)" in told
    assert "--resume" in told
    assert "Traceback" not in told
    assert not [pid for pid in started.values() if Path(f"/proc/{pid}").exists()]

    resumed = finished(folder, *two, "--resume", "--set", "folder=killed")
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(losses(folder / "killed")) == list(range(24))
    if not compared:
        return
    whole = finished(folder, *two, "--set", "folder=whole")
    assert whole.returncode == 0, whole.stderr
    assert losses(folder / "killed") == losses(folder / "whole")
    assert len(losses(folder / "whole")) == 24


def wait_for_steps(folder: Path, steps: int) -> dict[int, int]:
    """Rank -> process, once a run has done so many steps."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        seen = events(folder)
        if max((e.step or 0 for e in seen), default=0) >= steps:
            return {e.rank: int(str(e.data["pid"])) for e in seen if e.kind == "start"}
        time.sleep(0.05)
    raise AssertionError(f"no step {steps} in {folder} within 60 s")


@pytest.mark.slow
def test_the_same_run_file_works_under_torchrun(folder) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = ["shardwise.cli", "train", "run.toml", "--set", "layout=pp=2", "--set", "training.steps=2"]
    done = subprocess.run([*torchrun, *arguments], cwd=folder, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    alone = finished(folder, "--set", "layout=dp=1", "--set", "training.steps=2", "--set", "folder=alone")
    assert alone.returncode == 0, alone.stderr
    assert losses(folder / "runs" / "run") == pytest.approx(losses(folder / "alone"), rel=1e-5)


SCRIPT = """
import shardwise as sw
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
    def forward(self, input_ids, labels):
        return self.head(self.embed(input_ids))

run = dict(layout="pp=2", task=dict(kind="random_tokens"), training=dict(steps=2, global_batch=4))
print("losses", len(sw.train(run, model=Mine).losses))
"""


def test_a_script_without_a_main_guard_trains_a_class_of_its_own(tmp_path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "losses 2" in done.stdout
