"""Makes the world of one rank from the description of a run: model, task, program, optimizer.

Knows the order in which they are made. Only what this rank holds gets values: from a checkpoint where the run
resumes, from a folder of safetensors, or from the model's own initialisation keyed by seed and name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn

from shardwise.checkpoint.source import open_checkpoint
from shardwise.execute.assemble import Fill, agreed_schedule, assemble, fill_from
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.launch.worker import Worker
from shardwise.plan.sources import AnySource, GivenSource
from shardwise.schedule import GENERATORS, Schedule
from shardwise.tasks import Task
from shardwise.trace.placing import place
from shardwise.train.asynchronous.saved import restore_worker
from shardwise.train.asynchronous.workers import Workers
from shardwise.train.divisions import Divisions, Tell, agreed_divisions
from shardwise.train.materials import about, build_model, build_task, first_micro_batch, fresh_models, state_of
from shardwise.train.memory import own_memory
from shardwise.train.model import Values
from shardwise.train.optimizer import optimizer_for
from shardwise.train.run_file import Run
from shardwise.train.saved_values import SavedValues
from shardwise.train.state import check_model, check_state, restore
from shardwise.train.update import update
from shardwise.train.world import Candidate, Job, ModelLike, World

__all__ = [
    "Candidate",
    "Job",
    "ModelLike",
    "World",
    "about",
    "bring_buffers",
    "build",
    "build_model",
    "build_task",
    "first_micro_batch",
    "lay_out",
    "schedule_of",
]


def build(
    job: Job,
    context: RankContext,
    *,
    worker: Worker | None = None,
    on_plan: Tell | None = None,
    on_estimate: Tell | None = None,
) -> World:
    """The world of this rank. Collective; rank 0 gives the plan in words to `on_plan` before the model is laid out, and
    a line about the estimate that it stores to `on_estimate`.

    `context` is that of the rank inside its `worker`, where a run has several.

    Raises what a wrong run raises: ConfigError, ModelError, LayoutError, CheckpointError.
    """
    run = job.run if worker is None else _of_worker(job.run, worker)
    device = torch.device(run.device, context.local_rank) if run.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    task = build_task(job)
    source = open_checkpoint(run.checkpoint_folder) if job.resume else None
    state = state_of(job, task)
    if source is not None:
        check_state(source, state)
    model, values = build_model(job, source)
    if source is not None:
        check_model(source, model)
    bring_buffers(model, device)
    fresh = fresh_models(job, model) if len(job.candidates) > 1 else None
    inputs = first_micro_batch(run, task, device)
    divisions = agreed_divisions(
        run,
        model,
        inputs,
        task=task,
        values=values,
        device=device,
        rank=context.rank,
        known=Divisions(layout=run.seeded_layout, tensor=job.tensor, experts=job.experts),
        on_plan=on_plan,
        on_estimate=on_estimate,
    )
    workers = None if worker is None or run.asynchronous is None else Workers(worker, run.asynchronous)
    if workers is not None:  # what each has measured differs
        divisions = dataclasses.replace(divisions, layout=workers.of_first(divisions.layout))
    schedule = schedule_of(divisions, rank=context.rank)
    if workers is not None and isinstance(schedule, GivenSource):
        schedule = GivenSource(schedule=workers.of_first(schedule.schedule))
    program, optimizer = lay_out(
        run,
        model,
        inputs,
        divisions,
        schedule,
        task=task,
        rank=context.rank,
        device=device,
        fill=_fill(values, device),
    )
    first_step = source.manifest.step if source is not None else 0
    stream = None
    if divisions.layout.schedule in GENERATORS and not GENERATORS[divisions.layout.schedule].flushes:
        stream = program.stream(
            first_step=first_step,
            update=lambda step, norm: update(program, optimizer, run.training, step=step, norm=norm),
            tell=lambda: own_memory(device),
        )
    if source is not None:
        program.numerics.from_state(source.manifest.state)
        restore(source, program=program, optimizer=optimizer, older=None if stream is None else stream.older)
    outer = None if workers is None else workers.outer_of(program)
    if source is not None and workers is not None and outer is not None:
        restore_worker(source, program, optimizer, workers, outer)
    return World(
        run=run,
        task=task,
        program=program,
        optimizer=optimizer,
        device=device,
        state=state,
        first_step=first_step,
        planned=divisions.planned,
        stream=stream,
        workers=workers,
        outer=outer,
        fresh=fresh,
    )


def lay_out(
    run: Run,
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    divisions: Divisions,
    schedule: AnySource,
    *,
    task: Task,
    rank: int,
    device: torch.device,
    fill: Fill | None,
) -> tuple[Program, torch.optim.Optimizer | None]:
    """The model on this rank as `divisions` say, and the run's optimizer over it. Collective."""
    program = assemble(
        model,
        inputs,
        layout=divisions.layout,
        rank=rank,
        loss=task.loss,
        device=device,
        fill=fill,
        tensor=divisions.tensor,
        experts=divisions.experts,
        context=divisions.context,
        techniques=run.techniques,
        schedule=schedule,
    )
    return program, optimizer_for(program, run.training, on_host=divisions.layout.offloads_optimizer)


def schedule_of(divisions: Divisions, *, rank: int) -> AnySource:
    """Where the schedule comes from, the same on every rank. Collective where it is read or was searched for."""

    def on_rank_0() -> Schedule:
        assert divisions.schedule is not None  # a layout that searches has been searched for
        return divisions.schedule

    return agreed_schedule(divisions.layout, rank=rank, find=on_rank_0)


def bring_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers where they are computed with."""
    for name, buffer in model.named_buffers():
        if buffer.device != device:
            place(model, {name: buffer.to(device)})


def _of_worker(run: Run, worker: Worker) -> Run:
    """The run as a worker writes it: those behind the first have a folder of their own, but for checkpoints."""
    if worker.index == 0:
        return run
    checkpoint = run.checkpoint.model_copy(update={"folder": str(run.checkpoint_folder)})
    return run.model_copy(update={"folder": str(Path(run.folder) / worker.folder), "checkpoint": checkpoint})


def _fill(values: Values | None, device: torch.device) -> Fill | None:
    """How parameters get their values; None: they have them."""
    if values is None:
        return None
    return fill_from(values, device, read=values.read if isinstance(values, SavedValues) else None)
