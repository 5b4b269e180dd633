"""`shardwise verify`: what was trained is verified with its trained weights; another model is told apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, layers=2, broken=False):
        super().__init__()
        self.broken = broken
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(layers)))
    def forward(self, input_ids, labels):
        x = self.blocks(self.embed(input_ids))
        return self.head(x - x.mean(0) if self.broken else x)  # samples must not see each other
"""
RUN = """
layout = "pp=2"
[model]
factory = "small:Small"
[task]
kind = "random_tokens"
[training]
steps = 2
global_batch = 8
[checkpoint]
every = 2
"""


def shardwise(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardwise.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "small.py").write_text(MODEL)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


@pytest.mark.slow
def test_trained_weights_are_verified_and_a_finished_run_has_nothing_left_to_train(folder) -> None:
    trained = shardwise(folder, "train", "run.toml")
    assert trained.returncode == 0, trained.stderr
    again = shardwise(folder, "train", "run.toml", "--resume")
    assert "nothing left to train: all 2 steps are done" in again.stdout
    proven = shardwise(folder, "verify", "run.toml", "--trained")
    assert proven.returncode == 0, proven.stderr
    assert "equal: " in proven.stdout
    assert "against the whole model on one device" in proven.stdout
    streamed = shardwise(folder, "verify", "run.toml", "--trained", "--reference", "streamed")
    assert streamed.returncode == 0, streamed.stderr
    assert "against the model streamed unit by unit on one device" in streamed.stdout
    assert _loss_line(streamed.stdout) == _loss_line(proven.stdout)  # of the trained weights, not of new ones


def _loss_line(table: str) -> str:
    return next(line for line in table.splitlines() if line.startswith("  loss "))


@pytest.mark.slow
def test_a_model_whose_samples_see_each_other_has_status_1(folder) -> None:
    told = shardwise(folder, "verify", "run.toml", "--set", "model.options.broken=true")
    assert told.returncode == 1, told.stderr
    assert "NOT EQUAL" in told.stdout


def test_options_that_do_not_go_together_are_one_line(folder) -> None:
    told = shardwise(folder, "verify", "run.toml", "--reference", "streamed", "--steps", "2")
    assert told.returncode != 0
    assert told.stderr.splitlines() == [
        "shardwise: a streamed reference takes one step, but steps=2 (as was asked for); use steps=1, or "
        'reference="whole" on a machine with more memory'
    ]
