"""`shardwise verify`: the layout of a run against one device, on the first batch of its data. Exit status 1 if not
equal."""

from __future__ import annotations

import sys
from typing import Annotated

import torch.nn as nn
import typer

from shardwise.checkpoint.source import open_checkpoint
from shardwise.cli.options import Overrides, RunFile
from shardwise.tasks import sample_indices
from shardwise.trace.placing import named_tensors, place
from shardwise.train.build import Job, build_model, build_task
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
) -> None:
    """Compare loss, every gradient and the updated weights with those of one device, on real data of the run.

    Prints a table; names the first unit that differs, if one does, and ends with status 1.

    shardwise verify run.toml --set layout=pp=4
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
    whole = trained or described.model.path is not None
    model = _with_values(job, trained=trained) if whole else model_factory(described.model)
    comparison = verify(
        model,
        task.samples(indices, "train"),
        layout=described.seeded_layout,
        loss=task.loss,
        weight=task.weight,
        steps=steps,
        dtype=dtype,
    )
    print(comparison)
    if not comparison.equal:
        sys.exit(1)


def _with_values(job: Job, *, trained: bool) -> nn.Module:
    """The model with the values of the run's latest checkpoint, or of its folder of safetensors, in memory."""
    source = open_checkpoint(job.run.checkpoint_folder) if trained else None
    model, values = build_model(job, source)
    assert values is not None
    first: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        first.setdefault(id(tensor), name)
    parameters = {name for name, _ in model.named_parameters()}
    place(model, {name: values([name])[name] for name in first.values() if name in parameters})
    return model
