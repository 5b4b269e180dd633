"""The batch script of a job, as text; and what cannot be asked of SLURM."""

from __future__ import annotations

import subprocess

import pytest

from shardwise.errors import ConfigError
from shardwise.launch.slurm import SlurmJob

JOB = {"name": "demo", "command": ["python", "-m", "shardwise", "train", "a run.toml"], "folder": "/shared", "nodes": 2}

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=demo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=8
#SBATCH --partition=long
#SBATCH --account=team
#SBATCH --time=04:00:00
#SBATCH --chdir=/shared
#SBATCH --output=/shared/slurm-%j.log
#SBATCH --qos=high

# Written by `shardwise launch`. One task a rank; the first that fails ends the others.
set -euo pipefail
export OMP_NUM_THREADS=4
srun --kill-on-bad-exit=1 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=4 --mpi=pmix \\
    python -m shardwise train 'a run.toml'
"""


def job(**asked: object) -> SlurmJob:
    return SlurmJob(**{"log": "/shared/slurm-%j.log", "ranks_per_node": 8, **JOB, **asked})  # type: ignore[arg-type]


def test_a_script_says_all_that_was_asked() -> None:
    asked = {"partition": "long", "account": "team", "time": "04:00:00", "mpi": "pmix", "options": ["--qos=high"]}
    assert job(cpus_per_rank=4, gpus_per_node=8, **asked).script() == SCRIPT
    assert job().ranks == 16


def test_what_was_not_asked_is_left_to_slurm_and_the_script_is_one_of_bash() -> None:
    script = job().script()
    for option in ("--gpus", "--partition", "--account", "--time", "--mpi"):
        assert option not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=20, check=False).returncode == 0


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"nodes": 0}, "1 or more nodes, but got 0"),
        ({"ranks_per_node": 0}, "1 or more ranks per node, but got 0"),
        ({"cpus_per_rank": 0}, "1 core or more"),
        ({"gpus_per_node": -1}, "no negative number of GPUs"),
        ({"options": ["qos=high"]}, "begins with"),
        ({"options": ["--comment=a\nrm -rf /"]}, "one line"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        job(**wrong)
