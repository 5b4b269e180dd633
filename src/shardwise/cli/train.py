"""`shardwise train`: the command around `train`. Says how to go on after a rank died."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from shardwise.checkpoint.storage import complete_steps
from shardwise.cli.options import Overrides, RunFile
from shardwise.errors import LaunchError
from shardwise.train.asked import Asked
from shardwise.train.run import train
from shardwise.train.run_file import Run

__all__ = ["command"]


def command(
    run: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar="", help="Go on from the run's latest checkpoint, also on another layout."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", metavar="", help="Begin anew where the run's folder has checkpoints: they are deleted."
        ),
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="CLUSTER", help="Instead of the run's: what layouts are searched and priced for."),
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", metavar="", help='With --resume and layout = "auto": search again, not as before.'),
    ] = False,
) -> None:
    """Train the model of a run, split over processes as its layout says.

    Starts one process for each rank here, shows the plan and then progress.
    If a rank fails, it ends the others and says why, with status 1.
    Under torchrun, srun or mpirun it is one of their processes instead.

    shardwise train run.toml
    shardwise train run.toml --set layout=dp=2,pp=2 --set training.steps=50
    shardwise train run.toml --set layout=auto --cluster cluster.toml
    shardwise train run.toml --resume
    torchrun --nproc-per-node 4 -m shardwise train run.toml
    mpirun -np 4 shardwise train run.toml

    The run file:
      folder  = "runs/mine"      gets events/, checkpoints/ and prepared data/
      layout  = "dp=2,pp=2"      replicas x pipeline, one process for each;
                                 schedule=zb-v, say: see shardwise plan;
                                 "auto": the best for this machine is searched
      balance = "flops"          or measured, parameters, depth: equal stages
      cluster = "cluster.toml"   what a step is estimated for (shardwise report)
      \\[model]                    config = {model_type = "llama", ...} or a
                                 JSON file; path = folder of safetensors;
                                 or factory = "module:function"
      \\[task]                     kind = "language_modelling", sources = files
                                 or "stdlib", sequence_length, ...
      \\[training]                 steps, global_batch, learning_rate, warm_up,
                                 clip, seed, evaluate_every, ...
      \\[checkpoint]               every (steps; 0: never), keep, folder
      \\[auto]                     measure, steps: of layout = "auto", how many
                                 layouts the first steps measure, and how long
      \\[timeline]                 steps, every: which are recorded on all ranks,
                                 for shardwise draw FOLDER
      \\[tp_plan]                  "layers.*.mlp.up_proj" = "colwise", ...: how
                                 shards divide units; else found and proven

    BatchNorm normalises each micro-batch of a replica, or with model.batch_norm
    = "synchronised" of all together (docs/tasks.md).
    """
    told = [*(overrides or ()), *([f"cluster={json.dumps(cluster)}"] if cluster else ())]
    described = Asked.of(run, told).run
    try:
        train(run, overrides=told, resume=resume, overwrite=overwrite, search=search)
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
