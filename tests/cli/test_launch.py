"""`shardwise launch`: the script that is printed, the one that is submitted, and a job that trains by it.

There is no SLURM here: `srun` and `sbatch` are two scripts that start processes with the variables that SLURM sets.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from shardwise.cli import run_command
from shardwise.events import read_events

RUN = """
folder = "runs/job"
layout = "dp=2"
[model]
factory = "torch_model:Tiny"
[task]
kind = "random_tokens"
[training]
steps = 3
global_batch = 4
"""
MODEL = """
from torch import nn
class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
    def forward(self, input_ids, labels):
        return self.head(self.embed(input_ids))
"""
# as sbatch: runs the script where it stands, and says the number of the job
SBATCH = """#!/bin/bash
export SLURM_JOB_ID=41
bash "$1" > job.log 2>&1 || { cat job.log >&2; exit 1; }
echo "Submitted batch job 41"
"""
# as srun: --ntasks processes of one step on one node
SRUN = """#!{python}
import os, subprocess, sys
options = [a for a in sys.argv[1:] if a.startswith("--") and "=" in a]
count = int(next(o for o in options if o.startswith("--ntasks=")).partition("=")[2])
assert "--kill-on-bad-exit=1" in options
command = sys.argv[1 + len(options):]
step = dict(SLURM_STEP_ID="0", SLURM_NTASKS=str(count), SLURM_NODEID="0", SLURM_STEP_NODELIST="node1",
            SLURM_STEP_TASKS_PER_NODE=str(count))
tasks = [subprocess.Popen(command, env={{**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
         for i in range(count)]
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "torch_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_dry_run_prints_the_script_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", "run.toml", "--slurm", "--nodes", "2", "--time", "00:10:00", "--resume", "--dry-run"]
    assert run_command([*arguments, "--set", "training.steps=5", "--set", "communication.backend=mpi"]) == 0
    told = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in told
    assert "#SBATCH --time=00:10:00" in told
    assert f"#SBATCH --output={folder}/runs/job/slurm-%j.log" in told
    assert " --mpi=pmix " in told
    run = f"{sys.executable} -m shardwise train {folder}/run.toml --set training.steps=5"
    assert f"{run} --set communication.backend=mpi --resume" in told
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--slurm", "--nodes", "2", "--ranks-per-node", "2"], "dp=2,pp=1 has 2 and 2 nodes of 2 are 4"),
        ([], "none is named; add --slurm"),
        (["--slurm"], "sbatch, which is not here"),
    ],
)
def test_what_cannot_be_launched_is_said(
    arguments: list[str], rule: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert run_command(["launch", "run.toml", *arguments]) == 1
    assert rule in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_that_is_submitted_trains_on_the_ranks_of_srun(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = folder / "tools"
    tools.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN.format(python=sys.executable)}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert run_command(["launch", "run.toml", "--slurm"]) == 0, capsys.readouterr().err
    assert "Submitted batch job 41" in capsys.readouterr().out
    steps = [event for event in read_events(folder / "runs" / "job" / "events") if event.kind == "step"]
    assert {(event.rank, event.step) for event in steps if event.rank == 0} == {(0, 0), (0, 1), (0, 2)}
    assert (folder / "job.log").read_text().count("training ") == 1  # rank 0 alone tells
