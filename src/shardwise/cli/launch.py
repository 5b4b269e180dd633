"""`shardwise launch --slurm`: writes the batch script of a run, and hands it to sbatch. Starts no rank itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.options import Overrides, RunFile
from shardwise.errors import ConfigError, LaunchError, LayoutError
from shardwise.launch.slurm import SlurmJob
from shardwise.train.run_file import load_run

__all__ = ["command"]


def command(
    run: RunFile,
    slurm: Annotated[bool, typer.Option("--slurm", metavar="", help="For SLURM: the one there is so far.")] = False,
    nodes: Annotated[int, typer.Option(metavar="N", help="Nodes of the job.")] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(metavar="N", help="Ranks on each; the layout's, shared out evenly, if not given.")
    ] = None,
    cpus_per_rank: Annotated[int, typer.Option(metavar="N", help="Cores of a rank, and its threads.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(metavar="N", help='GPUs of a node; one a rank with device = "cuda".')
    ] = None,
    partition: Annotated[str, typer.Option(metavar="NAME", help="SLURM's.")] = "",
    account: Annotated[str, typer.Option(metavar="NAME", help="SLURM's.")] = "",
    time: Annotated[str, typer.Option(metavar="HH:MM:SS", help="The job's limit.")] = "",
    mpi: Annotated[
        str, typer.Option(metavar="KIND", help='srun\'s --mpi; pmix with communication.backend = "mpi".')
    ] = "",
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Another option of sbatch. May be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", metavar="", help="Go on from the latest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Print the script; submit nothing.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a run on a cluster: write a batch script, and submit it.

    shardwise launch run.toml --slurm --nodes 2 --ranks-per-node 8 --dry-run
    shardwise launch run.toml --slurm --nodes 2 --time 04:00:00 --resume

    The script is RUN_FOLDER/job.sh; what ranks print goes beside it, to
    slurm-JOB.log. The folder you call from must be the same on every node.
    The other launchers need no script: see docs/launching.md.
    """
    if not slurm:
        raise ConfigError("a script is written for one kind of cluster, but none is named; add --slurm")
    described = load_run(run, overrides or ())
    wanted = described.layout.world_size
    each = -(-wanted // nodes) if ranks_per_node is None else ranks_per_node
    gpus = (each if described.device == "cuda" else 0) if gpus_per_node is None else gpus_per_node
    by_mpi = described.communication.backend == "mpi"
    changes = [part for override in overrides or () for part in ("--set", override)]
    folder = Path(described.folder).expanduser().resolve()
    job = SlurmJob(
        name=folder.name,
        command=[
            sys.executable, "-m", "shardwise", "train", str(Path(run).resolve()), *changes, *["--resume"] * resume
        ],
        folder=str(Path.cwd()),
        log=str(folder / "slurm-%j.log"),
        nodes=nodes,
        ranks_per_node=each,
        cpus_per_rank=cpus_per_rank,
        gpus_per_node=gpus,
        partition=partition,
        account=account,
        time=time,
        mpi=mpi or ("pmix" if by_mpi else ""),
        options=tuple(sbatch or ()),
    )  # fmt: skip
    if job.ranks != wanted:
        raise LayoutError(
            f"a job has as many ranks as its layout, but {described.layout} has {wanted} and {nodes} nodes of {each} "
            f"are {job.ranks}; change --nodes, --ranks-per-node, or layout"
        )
    if dry_run:
        print(job.script(), end="")
        return
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "job.sh"
    script.write_text(job.script(), encoding="utf-8")
    _submit(script)


def _submit(script: Path) -> None:
    found = shutil.which("sbatch")
    if found is None:
        raise LaunchError(
            f"jobs are handed to sbatch, which is not here; {script} is written: submit it where SLURM is, or look at "
            "it with --dry-run"
        )
    done = subprocess.run([found, str(script)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LaunchError(f"sbatch did not take {script}: {done.stderr.strip() or done.returncode}; correct it")
    print(done.stdout.strip())
