"""Ranks of torchrun, mpirun and submitit train as one device does, and end together when one of them fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import submitit

from shardwise.cli import run_command
from shardwise.events import read_events
from under_mpi import mpirun, needs_mpi

# A model of its own that fails on one rank, if told, at its third call there.
TINY = """
import torch.distributed as dist
from torch import nn

class Tiny(nn.Module):
    def __init__(self, fails=-1):
        super().__init__()
        self.fails, self.calls = fails, 0
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)))
    def forward(self, input_ids, labels):
        if dist.is_initialized() and dist.get_rank() == self.fails:
            self.calls += 1
            if self.calls > 2:
                raise ValueError(f"the fault of rank {self.fails}")
        return self.head(self.blocks(self.embed(input_ids)))
"""
RUN = """
layout = "pp=2"
[model]
factory = "launched_model:Tiny"
[task]
kind = "random_tokens"
[training]
steps = 4
global_batch = 8
[timeline]
steps = []
"""
VERB = ["-m", "shardwise", "train", "run.toml"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "launched_model.py").write_text(TINY)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def losses(folder: Path) -> list[float]:
    steps = [event for event in read_events(folder / "events") if event.kind == "step" and event.rank == 0]
    return [float(str(event.data["loss"])) for event in steps]


def one_device(folder: Path) -> list[float]:
    """The curve of the same run on one rank of this process's own."""
    command = [sys.executable, *VERB, "--set", "layout=pp=1", "--set", "folder=one"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=100)
    return losses(folder / "one")


def told_once(finished: subprocess.CompletedProcess[str]) -> None:
    """One rank says what went wrong; the others, and every other rank's traceback, are silent."""
    assert finished.returncode != 0
    assert finished.stderr.count("ValueError: the fault of rank 1\n") == 1, finished.stderr
    assert finished.stderr.count("rank 1 of 2; the others end with it") == 1
    assert finished.stderr.count("]: Traceback (most recent call last)") == 1  # torchrun adds one of its own


@needs_mpi
@pytest.mark.parametrize("backend", [pytest.param("gloo", marks=pytest.mark.slow), "mpi"])
@pytest.mark.timeout(300)
def test_ranks_of_mpirun_train_as_one_device(backend: str, folder: Path) -> None:
    finished = mpirun(2, [*VERB, "--set", f"communication.backend={backend}"], folder=folder, timeout_s=200)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("training ") == 1  # rank 0 alone tells
    assert losses(folder / "runs" / "run") == pytest.approx(one_device(folder), rel=1e-6)


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_algorithms_of_open_mpi_are_used_and_change_no_loss(folder: Path) -> None:
    chosen = ["--set", "communication.mpi_allreduce=ring", "--set", "communication.mpi_broadcast=chain"]
    replicas = ["--set", "layout=dp=2", "--set", "communication.backend=mpi"]
    finished = mpirun(2, [*VERB, *replicas, *chosen], folder=folder, timeout_s=200)
    assert finished.returncode == 0, finished.stderr
    assert losses(folder / "runs" / "run") == pytest.approx(one_device(folder), rel=1e-5)


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["gloo", "mpi"])
def test_an_error_on_one_rank_of_mpirun_is_told_once_and_ends_all(backend: str, folder: Path) -> None:
    arguments = [*VERB, "--set", "layout=dp=2", "--set", "model.options.fails=1"]
    told_once(mpirun(2, [*arguments, "--set", f"communication.backend={backend}"], folder=folder, timeout_s=200))


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("address", ["of mpirun's node", "of nobody"])
def test_ranks_on_several_nodes_need_no_address(address: str, folder: Path) -> None:
    """Each process is told that it is alone on its node; the second time nothing tells where mpirun is."""
    hides = "" if address == "of mpirun's node" else "os.environ.pop('OMPI_MCA_orte_hnp_uri')"
    script = f"""
import os, sys
os.environ.update(OMPI_COMM_WORLD_LOCAL_SIZE="1", OMPI_COMM_WORLD_LOCAL_RANK="0")
{hides}
from shardwise.cli import main
main(["train", "run.toml", "--set", "communication.backend=gloo"])
"""
    finished = mpirun(2, ["-c", script], folder=folder, timeout_s=200)
    assert finished.returncode == 0, finished.stderr
    assert len(losses(folder / "runs" / "run")) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_on_one_rank_of_torchrun_is_told_once_and_ends_all(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = ["shardwise", "train", "run.toml", "--set", "layout=dp=2", "--set", "model.options.fails=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, *arguments]
    told_once(
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env=environment, check=False)
    )


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["gloo", "mpi"])
def test_a_layout_is_verified_on_the_ranks_of_mpirun_and_rank_0_prints(backend: str, folder: Path) -> None:
    arguments = ["-m", "shardwise", "verify", "run.toml", "--set", f"communication.backend={backend}"]
    finished = mpirun(2, arguments, folder=folder, timeout_s=200)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("against the whole model on one device") == 1
    assert finished.stdout.count("\nequal: ") == 1


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_of_other_verbs_rank_0_speaks_for_all(folder: Path) -> None:
    finished = mpirun(2, ["-m", "shardwise", "draw", "1f1b", "--ranks", "2", "--micro-batches", "2"], folder=folder)
    assert finished.returncode == 0, finished.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "shardwise", "draw", "1f1b", "--ranks", "2", "--micro-batches", "2"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert finished.stdout == alone.stdout


def test_mpi_is_for_ranks_that_mpi_has_started(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    run = str(folder / "run.toml")
    assert run_command(["train", run, "--set", "communication.backend=mpi"]) == 1
    assert "use `mpirun -np 2 shardwise train RUN.toml`" in capsys.readouterr().err
    assert run_command(["train", run, "--set", "communication.mpi_allreduce=ring"]) == 1
    assert 'algorithms of Open MPI are for backend = "mpi"' in capsys.readouterr().err
    assert run_command(["train", run, "--set", "communication.backend=nccl"]) == 1
    assert 'backend = "nccl" and device = "cpu"' in capsys.readouterr().err


def as_a_task_of_srun(folder: str) -> int:
    """What a task of submitit runs: its place becomes that of a task of srun."""
    os.chdir(folder)
    place = submitit.JobEnvironment()
    step = {
        "SLURM_JOB_ID": place.job_id,
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(place.num_tasks),
        "SLURM_PROCID": str(place.global_rank),
        "SLURM_LOCALID": str(place.local_rank),
        "SLURM_NODEID": str(place.node),
        "SLURM_STEP_NODELIST": place.hostname,
        "SLURM_STEP_TASKS_PER_NODE": str(place.num_tasks),
    }
    os.environ.update(step)
    return run_command(["train", "run.toml"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tasks_of_submitit_train(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # where tasks find what this file imports
    executor = submitit.LocalExecutor(folder=tmp_path_factory.mktemp("submitit"))
    executor.update_parameters(tasks_per_node=2, timeout_min=4)
    job = executor.submit(as_a_task_of_srun, str(folder))
    assert job.results() == [0, 0]
    assert len(losses(folder / "runs" / "run")) == 4
