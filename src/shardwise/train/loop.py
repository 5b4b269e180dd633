"""The training loop. It never asks which parallelism is on."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist

from shardwise.train.build import World
from shardwise.train.optimizer import set_rate
from shardwise.train.rate import learning_rate
from shardwise.train.state import save

__all__ = ["Emit", "evaluate", "run_steps"]

Emit = Callable[..., None]  # emit(kind, step=..., **data)


def run_steps(world: World, emit: Emit) -> list[float]:
    """All steps from `world.first_step`; returns their losses, the same on every rank and every layout."""
    program, optimizer, options = world.program, world.optimizer, world.run.training
    losses: list[float] = []
    for step in range(world.first_step, options.steps):
        start = time.perf_counter()
        result = program.step(world.micro_batches(step), step=step)
        norm = program.gradient_norm()
        if options.clip and norm > options.clip:
            program.scale_gradients(options.clip / norm)
        rate = _rate(world, step)
        if optimizer is not None:
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(result.loss)
        emit(
            "step",
            step=step,
            loss=result.loss,
            gradient_norm=norm,
            learning_rate=rate,
            weight=result.weight,
            step_s=time.perf_counter() - start,
            busy_s=sum(moment.end_s - moment.start_s for moment in result.moments),
            sent_bytes=dict(result.sent_bytes),
            memory_bytes=memory_of_ranks(world),
        )
        if result.experts is not None:
            emit(
                "experts",
                step=step,
                all_to_all_bytes=result.experts.all_to_all_bytes,
                rows={layer: list(rows) for layer, rows in result.experts.loads.items()},
                imbalance=result.experts.imbalance,
                dropped=sum(result.experts.dropped.values()),
            )
        if _due(options.evaluate_every, step, options.steps):
            evaluate(world, emit, step)
        if _due(world.run.checkpoint.every, step, options.steps):
            save_world(world, emit, step + 1)
    return losses


def evaluate(world: World, emit: Emit, step: int) -> None:
    """The mean loss over held-out samples, up to `evaluate_batches` global batches; nothing where there are none."""
    options, program = world.run.training, world.program
    available = world.task.num_samples("held_out")
    size = min(options.global_batch, available)
    if size < world.run.layout.num_replicas:
        return
    total = weight = 0.0
    modes = [(module, module.training) for module in program.model.modules()]
    program.model.eval()
    for number in range(min(options.evaluate_batches, available // size)):
        result = program.evaluate(world.held_out(number, size), step=step)
        total, weight = total + result.loss * result.weight, weight + result.weight
    for module, training in modes:
        module.training = training
    loss = total / weight if weight else 0.0
    emit("evaluation", step=step, loss=loss, weight=weight, **world.task.metrics(loss))


def save_world(world: World, emit: Emit, steps: int) -> None:
    """A checkpoint of `steps` finished steps."""
    start = time.perf_counter()
    folder = world.run.checkpoint_folder
    state = {**world.state, "layout": str(world.run.layout)}
    save(folder, steps, program=world.program, optimizer=world.optimizer, state=state, keep=world.run.checkpoint.keep)
    emit("checkpoint", step=steps - 1, folder=str(folder), step_s=time.perf_counter() - start)


def memory_of_ranks(world: World) -> list[int]:
    """Bytes that every rank holds now, by rank: resident memory, or on a GPU what torch has allocated at most."""
    if world.device.type == "cuda":
        mine = torch.cuda.max_memory_allocated(world.device)
    else:
        mine = psutil.Process().memory_info().rss
    if world.run.layout.world_size == 1:
        return [mine]
    of_ranks = torch.zeros(world.run.layout.world_size, dtype=torch.int64, device=world.device)
    of_ranks[world.program.place.rank] = mine
    dist.all_reduce(of_ranks)
    return [int(number) for number in of_ranks.tolist()]


def _rate(world: World, step: int) -> float:
    options = world.run.training
    return learning_rate(
        step,
        peak=options.learning_rate,
        steps=options.steps,
        warm_up=options.warm_up,
        schedule=options.schedule,
        final_fraction=options.final_fraction,
    )


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)
