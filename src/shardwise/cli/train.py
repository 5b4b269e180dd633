"""`shardwise train`: the command around `train`. Says how to go on after a rank died."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardwise.checkpoint.storage import complete_steps
from shardwise.cli.options import Overrides, RunFile
from shardwise.errors import LaunchError
from shardwise.train.run import train
from shardwise.train.run_file import Run, load_run

__all__ = ["command"]


def command(
    run: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's latest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew: delete the run's checkpoints.")] = False,
) -> None:
    """Train the model of a run on the layout of a run.

    Starts one process for each rank here. Under torchrun, srun or mpirun it is one of their processes instead:

    torchrun --nproc-per-node 4 --no-python shardwise train run.toml

    Events of every rank go to RUN_FOLDER/events, checkpoints to RUN_FOLDER/checkpoints.
    """
    described = load_run(run, overrides or ())
    try:
        train(described, resume=resume, overwrite=overwrite)
    except LaunchError:
        _say_how_to_go_on(described, run)
        raise
    except KeyboardInterrupt:
        _say_how_to_go_on(described, run)
        raise


def _say_how_to_go_on(described: Run, path: str) -> None:
    steps = complete_steps(described.checkpoint_folder)
    if steps:
        print(
            f"the checkpoint of step {max(steps)} is whole: go on with `shardwise train {path} --resume`",
            file=sys.stderr,
        )
