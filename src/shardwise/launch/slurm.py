"""A batch script for SLURM that trains a run: text from values. It submits nothing and reads no environment.

sbatch job.sh ─► nodes ─► srun: one task a rank, each `python -m shardwise train run.toml`, which reads SLURM_*
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.errors import ConfigError

__all__ = ["SlurmJob"]


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What is asked of SLURM, and what each of its tasks runs.

    command         of every rank; the same on all
    folder          the working folder on every node, which they share
    log             the file that gets what ranks print; %j is the job's number
    cpus_per_rank   cores, and threads of a rank
    gpus_per_node   0: none; a rank uses the one of its local number
    time            the limit in SLURM's words, such as "04:00:00"; "" leaves it to the partition
    mpi             how srun starts MPI, such as "pmix"; "" where ranks do not exchange through it
    options         further options of sbatch, such as "--qos=high"
    """

    name: str
    command: Sequence[str]
    folder: str
    log: str
    nodes: int
    ranks_per_node: int
    cpus_per_rank: int = 1
    gpus_per_node: int = 0
    partition: str = ""
    account: str = ""
    time: str = ""
    mpi: str = ""
    options: Sequence[str] = ()

    def __post_init__(self) -> None:
        for what, count in (("nodes", self.nodes), ("ranks per node", self.ranks_per_node)):
            if count < 1:
                raise ConfigError(f"a job has 1 or more {what}, but got {count}; ask for more")
        if self.cpus_per_rank < 1 or self.gpus_per_node < 0:
            raise ConfigError(
                f"a rank has 1 core or more, and a node no negative number of GPUs, but got {self.cpus_per_rank} and "
                f"{self.gpus_per_node}; correct them"
            )
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise ConfigError(
                    f'an option of sbatch begins with "-" and is one line, but got {option!r}; correct it'
                )

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def script(self) -> str:
        """The text of the file for sbatch."""
        asked = [
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.ranks_per_node}",
            f"--cpus-per-task={self.cpus_per_rank}",
            *([f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []),
            *([f"--partition={self.partition}"] if self.partition else []),
            *([f"--account={self.account}"] if self.account else []),
            *([f"--time={self.time}"] if self.time else []),
            f"--chdir={self.folder}",
            f"--output={self.log}",
            *self.options,
        ]
        lines = "\n".join(f"#SBATCH {option}" for option in asked)
        mpi = f" --mpi={self.mpi}" if self.mpi else ""
        return textwrap.dedent(
            """\
            #!/bin/bash
            {lines}

            # Written by `shardwise launch`. One task a rank; the first that fails ends the others.
            set -euo pipefail
            export OMP_NUM_THREADS={threads}
            srun --kill-on-bad-exit=1 --ntasks={ranks} --ntasks-per-node={each} --cpus-per-task={threads}{mpi} \\
                {command}
            """
        ).format(
            lines=lines,
            threads=self.cpus_per_rank,
            ranks=self.ranks,
            each=self.ranks_per_node,
            mpi=mpi,
            command=shlex.join(self.command),
        )
