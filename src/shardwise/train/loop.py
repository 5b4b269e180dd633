"""The training loop. It never asks which parallelism is on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from shardwise.checkpoint.save import Shard
from shardwise.execute.program import StepResult
from shardwise.train.asynchronous.saved import shards_of_worker, state_of_workers
from shardwise.train.build import World
from shardwise.train.evaluate import evaluate
from shardwise.train.memory import PeakMemory
from shardwise.train.state import save
from shardwise.train.steps import Done, steps_of
from shardwise.train.timeline import record
from shardwise.train.update import rate_of

__all__ = ["Emit", "evaluate", "run_steps"]

Emit = Callable[..., None]  # emit(kind, step=..., **data)


def run_steps(world: World, emit: Emit, *, until: int | None = None) -> list[float]:
    """All steps from `world.first_step`, or those before `until`; returns their losses, the same on every rank and
    every layout. Nothing is under way behind the last one."""
    options = world.run.training
    losses: list[float] = []
    end = options.steps if until is None else min(until, options.steps)

    def pauses(step: int) -> bool:
        every = (options.evaluate_every, world.run.checkpoint.every)
        return step + 1 == end or any(_due(each, step, options.steps) for each in every)

    peak = PeakMemory(world.device)
    for done in steps_of(world, end=end, pauses=pauses):
        step, result = done.step, done.result
        recorded = world.run.timeline.wants(step, options.steps) and world.stream is None
        losses.append(result.loss)
        emit(
            "step",
            step=step,
            loss=result.loss,
            gradient_norm=done.norm,
            learning_rate=rate_of(options, step),
            weight=result.weight,
            step_s=done.seconds,
            busy_s=result.moments.busy_s,
            sent_bytes=dict(result.sent_bytes),
            memory_bytes=list(done.memory_bytes),
            peak_bytes=peak.nbytes,
            **_seconds_of_parts(done, waits=world.device.type == "cpu" or recorded),
        )
        if step == world.first_step and world.program.compiled is not None:
            emit("compiled", step=step, notes=list(world.program.compiled.notes()))
        scale = world.program.numerics.loss_scale
        if scale is not None:
            emit("loss_scale", step=step, next_value=scale.value, skipped_steps=scale.skipped_steps)
        if result.experts is not None:
            emit(
                "experts",
                step=step,
                all_to_all_bytes=result.experts.all_to_all_bytes,
                rows={layer: list(rows) for layer, rows in result.experts.loads.items()},
                imbalance=result.experts.imbalance,
                dropped=sum(result.experts.dropped.values()),
            )
        if recorded:
            record_step(world, result, emit, step)
        if _due(options.evaluate_every, step, options.steps):
            evaluate(world, emit, step)
        if _due(world.run.checkpoint.every, step, options.steps):
            save_world(world, emit, step + 1)
        peak.begin_again()  # the next event tells of its own step alone
    return losses


def _seconds_of_parts(done: Done, *, waits: bool) -> dict[str, float]:
    """What an event tells of a step's parts; of those on a device only where it is waited for anyway."""
    if done.parts is None:
        return {}
    told = {"data_s": done.parts.data_s, "sums_s": done.result.sums_s}
    told["computed_s"] = done.parts.computed_s(done.result.moments)
    return {**told, "optimizer_s": done.parts.optimizer_s} if waits else told


def record_step(world: World, result: StepResult, emit: Emit, step: int) -> None:
    """What all ranks did in the step, into a file of the run's folder; told by rank 0."""
    start = time.perf_counter()
    recording = record(
        result,
        step=step,
        place=world.program.place,
        layout=str(world.run.layout),
        schedule=world.program.schedule_of(world.run.most_micro_batches),
        planned=world.planned,
        device=world.device,
    )
    if recording is None:
        return
    path = recording.write(world.run.timelines_folder)
    planned = recording.planned
    emit(
        "timeline",
        step=step,
        file=str(path),
        text=str(recording),
        num_ranks=recording.schedule.num_ranks,
        measured_s=recording.slowest.seconds,
        bubble=recording.bubble,
        exposed=recording.exposed,
        simulated_s=recording.simulated.seconds,
        simulated_bubble=recording.simulated.bubble_fraction,
        planned_s=None if planned is None else planned.seconds,
        planned_bubble=None if planned is None else planned.bubble_fraction,
        sums_s=recording.sums_s,
        clock_error_s=recording.clock_error_s,
        recording_s=time.perf_counter() - start,
    )


def save_world(world: World, emit: Emit, steps: int) -> None:
    """A checkpoint of `steps` finished steps."""
    start = time.perf_counter()
    folder = world.run.checkpoint_folder
    state = {**world.state, "layout": str(world.run.layout), **world.program.numerics.to_state()}
    older, keep = None if world.stream is None else world.stream.older, world.run.checkpoint.keep
    program, optimizer, workers, outer = world.program, world.optimizer, world.workers, world.outer
    of_worker: Iterable[Shard] = ()
    if workers is not None and outer is not None:
        state |= state_of_workers(workers, outer)
        of_worker = shards_of_worker(program, optimizer, workers, outer)
    with world.averaged():
        save(
            folder,
            steps,
            program=program,
            optimizer=optimizer,
            state=state,
            keep=keep,
            older=older,
            workers=workers,
            of_worker=of_worker,
        )
    emit("checkpoint", step=steps - 1, folder=str(folder), step_s=time.perf_counter() - start)


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)
