"""`shardwise verify`: the layout of a run against one device, on the first batch of its data. Exit status 1 if not
equal."""

from __future__ import annotations

import sys
from typing import Annotated

import torch.distributed as dist
import typer

from shardwise.cli.options import Overrides, RunFile
from shardwise.launch import LaunchedRanks, read_world
from shardwise.tasks import indices_at, samples_at
from shardwise.train.asked import Asked
from shardwise.train.materials import build_task, head_of
from shardwise.train.meeting import backend_of, check_own_ranks, meet
from shardwise.train.model import model_factory
from shardwise.train.run import found_for, prepare
from shardwise.train.run_file import Run
from shardwise.verify import verify

__all__ = ["command"]

_TIMEOUT_S = 3600.0  # of an exchange under another launcher: the others wait while rank 0 runs the reference


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

    Where layout = "auto": the layout that the run has found, or is found now.

    A model too large for one device: shardwise verify run.toml --reference streamed

    Under torchrun, srun or mpirun the layout runs on their ranks, and rank 0
    runs the one device and prints.
    """
    asked = Asked.of(run, overrides or ())
    world = read_world()
    meeting = None if world is None else meet(world, asked.run.communication, asked.run.device)
    if meeting is None or meeting.store is None:
        described = asked.on(found_for(asked, ranks=None if world is None else 1))
        check_own_ranks(described.communication, described.layout.world_size, described.device)
        equal = _compare(described, steps, dtype, trained, reference, None)
    else:
        with meeting.ending_together():
            backend = backend_of(asked.run.communication, asked.run.device)
            launched = meeting.ranks(backend, timeout_s=_TIMEOUT_S)
            if meeting.context.rank > 0:
                launched.serve()
                equal = True
            else:
                described = asked.on(found_for(asked, ranks=meeting.context.world_size))
                equal = _compare(described, steps, dtype, trained, reference, launched)
                launched.close()
            dist.destroy_process_group()
    if not equal:
        sys.exit(1)


def _compare(
    described: Run, steps: int, dtype: str | None, trained: bool, reference: str, launched: LaunchedRanks | None
) -> bool:
    """Prints the comparison; whether both sides are equal."""
    job = prepare(described.model_copy(update={"checkpoint": described.checkpoint.model_copy(update={"every": 0})}))
    task = build_task(job)
    seed = described.training.seed
    indices = indices_at(task, seed=seed, step=0, global_batch=described.training.global_batch)
    comparison = verify(
        model_factory(described.model, head_of(task)),
        samples_at(task, indices, "train", seed=seed, step=0),
        layout=described.seeded_layout,
        loss=task.loss,
        weight=task.weight,
        steps=steps,
        dtype=dtype,
        checkpoint=described.checkpoint_folder if trained else described.model.path,
        new_head=not trained and head_of(task) is not None,
        reference=reference,
        tp_plan=described.tp_plan,
        techniques=described.techniques,
        launched=launched,
    )
    print(comparison)
    return comparison.equal
