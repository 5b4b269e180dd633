"""`shardwise verify`: the layout of a run against one device, on the first batch of its data. Exit status 1 if not
equal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardwise.cli.options import Overrides, RunFile
from shardwise.tasks import sample_indices
from shardwise.train.build import build_task
from shardwise.train.model import model_factory
from shardwise.train.run import prepare
from shardwise.train.run_file import load_run
from shardwise.verify import verify

__all__ = ["command"]


def command(
    run: RunFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps after which weights are compared.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float64 settles doubt.")] = None,
    trained: Annotated[bool, typer.Option("--trained", help="With the weights of the latest checkpoint.")] = False,
    reference: Annotated[
        str,
        typer.Option(
            metavar="auto|whole|streamed",
            help="The one device: it holds the whole model, or streams it, a few units at a time (one step only). "
            "auto streams what would not fit the free memory.",
        ),
    ] = "auto",
) -> None:
    """Compare loss, every gradient and the updated weights with those of one device, on real data of the run.

    Prints a table; names the first unit that differs, if one does, and ends with status 1.

    shardwise verify run.toml --set layout=pp=4

    A model too large for one device: shardwise verify run.toml --reference streamed
    """
    described = load_run(run, overrides or ())
    job = prepare(described.model_copy(update={"checkpoint": described.checkpoint.model_copy(update={"every": 0})}))
    task = build_task(job)
    indices = sample_indices(
        seed=described.training.seed,
        step=0,
        global_batch=described.training.global_batch,
        num_samples=task.num_samples("train"),
    )
    comparison = verify(
        model_factory(described.model),
        task.samples(indices, "train"),
        layout=described.seeded_layout,
        loss=task.loss,
        weight=task.weight,
        steps=steps,
        dtype=dtype,
        checkpoint=described.checkpoint_folder if trained else described.model.path,
        reference=reference,
        tp_plan=described.tp_plan,
        techniques=described.techniques,
    )
    print(comparison)
    if not comparison.equal:
        sys.exit(1)
