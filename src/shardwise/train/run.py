"""Trains what a run describes: starts the ranks of its layout here, or is one of those that torchrun, SLURM or MPI
started. The process that starts ranks holds no model: it prepares the data, waits, and shows what rank 0 tells.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from shardwise.errors import LayoutError
from shardwise.events import Event, JsonlSink, Sink
from shardwise.execute.split_proof import in_words
from shardwise.launch import RankContext, init_process_group, read_world, run_ranks
from shardwise.launch.worker import join_worker, tell_all
from shardwise.tasks import Counted, Task
from shardwise.train.asked import Asked
from shardwise.train.build import Job, ModelLike, about, build
from shardwise.train.checks import check_experts, check_stages, check_tensor, make_folder
from shardwise.train.divided import num_elements
from shardwise.train.evaluate import check_outputs
from shardwise.train.export import describe
from shardwise.train.layout_search import Choice
from shardwise.train.measured_layouts import run_and_measure
from shardwise.train.meeting import Meeting, backend_of, check_own_ranks, meet
from shardwise.train.prepare import Start, found_for, prepare
from shardwise.train.progress import ProgressSink
from shardwise.train.run_file import Run

__all__ = ["Trained", "found_for", "prepare", "train", "train_on_rank"]

_LAST = 10  # steps whose mean loss is told at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What training leaves: `losses[i]` is that of step `first_step + i`, before its update."""

    folder: Path
    first_step: int
    losses: tuple[float, ...]


def train(
    run: Run | Mapping[str, Any] | str | Path,
    *,
    model: ModelLike | None = None,
    task: Task | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    search: bool = False,
    progress: Sink | None = None,
) -> Trained:
    """Train a run: a `Run`, a mapping that reads like a run file, or the path of one.

    model      instead of the run's: a function that makes one, or an `nn.Module` with its values
    task       instead of the run's
    resume     go on from the latest checkpoint of the run
    overwrite  begin anew where the run's folder holds checkpoints: they are deleted
    search     of layout = "auto", resumed: search again, instead of the layout that was found before
    progress   who is shown events; a bar or plain lines if not given

    Callable from a script without a main guard. Raises ConfigError before anything is started, and the error of
    the first rank that fails.
    """
    asked = Asked.of(run, overrides, search=search)
    started_s = time.monotonic()
    world = read_world()
    sink = progress or ProgressSink(bar=world is None or world.has_users_terminal)
    if overwrite and not resume and (world is None or world.rank == 0):
        shutil.rmtree(asked.run.checkpoint_folder, ignore_errors=True)
    how = Start(asked=asked, model=model, task=task, resume=resume, started_s=started_s)
    try:
        if world is None:
            job = how.job(how.choice(None))
            check_own_ranks(job.run.communication, job.run.layout.world_size, job.run.device)
            check_stages(job)
            job = dataclasses.replace(job, tensor=job.tensor or check_tensor(job))
            job = dataclasses.replace(job, experts=job.experts or check_experts(job))
            make_folder(job.run.events_folder)
            return _on_own_ranks(job, sink)
        meeting = meet(world, asked.run.communication, asked.run.device)
        with meeting.ending_together():
            return _as_one_rank(meeting, how, sink)
    finally:
        sink.close()


def train_on_rank(context: RankContext, job: Job, sinks: Sequence[Sink] = (), *, store: Store | None = None) -> Trained:
    """One rank's part. Events go to its own file; those of rank 0 also to `sinks` and to who started the ranks.

    `store` is where all ranks have met, if they have without a process group.
    """
    run, backend = job.run, backend_of(job.run.communication, job.run.device)
    worker = None
    if run.num_workers > 1:
        worker = join_worker(context, count=run.num_workers, backend=backend, store=store)
    elif run.layout.world_size > 1:
        init_process_group(context, backend=backend, store=store)
    if not job.resume:
        JsonlSink.path_of(run.events_folder, rank=context.rank).unlink(missing_ok=True)
        if context.rank == 0:
            shutil.rmtree(run.timelines_folder, ignore_errors=True)
    with JsonlSink(run.events_folder, rank=context.rank) as file:
        told: list[Callable[[Event], None]] = [file.emit]
        if context.rank == 0:
            told += [context.post, *(sink.emit for sink in sinks)]

        def emit(kind: str, *, step: int | None = None, **data: object) -> None:
            seconds = time.monotonic() - job.started_s
            event = Event(kind=kind, rank=context.rank, step=step, seconds=seconds, data=data)
            for tell in told:
                tell(event)

        inside = context if worker is None else worker.context
        if job.told:
            emit("layout", text=job.told, layout=str(run.layout), candidates=[str(c.layout) for c in job.candidates])
        world = build(
            job,
            inside,
            worker=worker,
            on_plan=lambda text: emit("plan", text=text),
            on_estimate=lambda text: emit("estimate", text=text),
        )
        if context.rank == 0 and run.checkpoint.every:
            describe(run, model=world.program.model, task=world.task)
        shapes = [
            num_elements(world.program, name, parameter) for name, parameter in world.program.model.named_parameters()
        ]
        emit(
            "start",
            steps=run.training.steps,
            first_step=world.first_step,
            layout=str(run.layout),
            data=about(world.task),
            counts=world.task.counts if isinstance(world.task, Counted) else "samples",
            global_batch=run.training.global_batch,
            precision=run.techniques.precision.label,
            pid=os.getpid(),
            num_parameters=sum(shapes),
            held_parameters=sum(parameter.numel() for parameter in world.program.parameters.values()),
            ready_s=time.monotonic() - job.started_s,
            split_backward=list(in_words(world.program.split_proofs)),
        )
        check_outputs(world)
        start = time.monotonic()
        world, losses = run_and_measure(world, emit, job.candidates)
        emit(
            "end",
            first_loss=losses[0] if losses else None,
            last_loss=sum(losses[-_LAST:]) / len(losses[-_LAST:]) if losses else None,
            train_s=time.monotonic() - start,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        if world.workers is not None:
            world.workers.close()
        world.program.close()
    return Trained(folder=Path(run.folder), first_step=world.first_step, losses=tuple(losses))


def _on_own_ranks(job: Job, sink: Sink) -> Trained:
    def show(_rank: int, value: object) -> None:
        if isinstance(value, Event):
            sink.emit(value)

    return run_ranks(
        train_on_rank,
        (job,),
        world_size=job.run.layout.world_size,
        on_message=show,
        num_threads=job.run.threads,
        preload=("shardwise.train.run", *_modelling()),
    )[0]


def _modelling() -> tuple[str, ...]:
    """The modules of transformers that making the plan has imported: once for all ranks is enough."""
    return tuple(name for name in sys.modules if name == "transformers" or name.startswith("transformers.models."))


def _as_one_rank(meeting: Meeting, how: Start, sink: Sink) -> Trained:
    """The process is a rank already. Rank 0 prepares the data for all, on a folder that they share."""
    context, store = meeting.context, meeting.store
    if not how.asked.searches:
        _check_number(how.asked.run, context)
    if how.asked.run.device == "cpu":
        torch.set_num_threads(how.asked.run.threads or 1)

    def prepared() -> tuple[Choice | None, Mapping[str, object]]:
        choice = how.choice(context.world_size)
        return choice, how.job(choice).task_options

    job = how.job(*(prepared() if store is None else tell_all(context, store, prepared)))
    _check_number(job.run, context)
    trained = train_on_rank(context, job, [sink] if context.rank == 0 else [], store=store)
    if dist.is_initialized():
        dist.destroy_process_group()
    return trained


def _check_number(run: Run, context: RankContext) -> None:
    if context.world_size != run.layout.world_size:
        raise LayoutError(
            f"a layout has as many ranks as were started, but {run.layout} has {run.layout.world_size} and there are "
            f"{context.world_size}; start {run.layout.world_size}, or set layout"
        )
