"""Held-out samples: their mean loss, and the score of what the model answers where its task has one.

    batches of held-out samples ──► loss stage of every replica: answers ──► rank 0: score ──► all ranks: figures

The same figures on every layout: samples keep their numbers. Never asks which parallelism is on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch

from shardwise.comm.gathered import from_first, to_first
from shardwise.errors import ConfigError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.modes import evaluating
from shardwise.tasks import Score, Scored
from shardwise.train.build import World

__all__ = ["evaluate", "held_out_batches"]

_BATCHES = 4  # of an evaluation by loss alone, where the run does not say

Rows = list[tuple[tuple[int, ...], dict[str, torch.Tensor]]]  # numbers of samples, and their answers by name


def evaluate(world: World, emit: Callable[..., None], step: int) -> None:
    """The mean loss over held-out samples, and the score of the task; nothing where there are too few of them.

    Of a task that is scored these are all held-out samples, unless the run gives a number of batches.
    """
    program, task = world.program, world.task
    batches = held_out_batches(
        task.num_samples("held_out"),
        size=world.run.training.global_batch,
        num_batches=world.run.training.evaluate_batches or (None if isinstance(task, Scored) else _BATCHES),
        parts=world.num_replicas * world.run.num_micro_batches,
    )
    if not batches or len(batches[0]) < world.num_replicas:
        return
    total = weight = 0.0
    rows: Rows = []
    with evaluating(program.model), world.averaged():
        for indices in batches:
            seen = _answering(task, rows) if isinstance(task, Scored) else None
            result = program.evaluate(world.held_out(indices), step=step, seen=seen)
            total, weight = total + result.loss * result.weight, weight + result.weight
    loss, weight = world.mean_over_workers(total / weight if weight else 0.0, weight)
    told: dict[str, object] = {"loss": loss, "weight": weight, **task.metrics(loss)}
    if isinstance(task, Scored):
        score = _scored(world, task, rows)
        told |= {"samples": sum(map(len, batches)), "figures": dict(score.figures), "report": score.report}
    emit("evaluation", step=step, **told)


def held_out_batches(available: int, *, size: int, num_batches: int | None, parts: int) -> tuple[range, ...]:
    """Which held-out samples are evaluated together: all, or as many as `num_batches` global batches of `size` hold.

    Batches differ by one sample at most, so that the last one is no exception; each has a sample for every one of its
    `parts` micro-batches, as long as there are so many.
    """
    wanted = available if num_batches is None else min(available, num_batches * size)
    if wanted == 0:
        return ()
    count = max(1, min(-(-wanted // size), wanted // parts))
    bounds = [wanted * number // count for number in range(count + 1)]
    return tuple(range(first, last) for first, last in itertools.pairwise(bounds))


def _answering(task: Scored, rows: Rows) -> Callable[[MicroBatch, object], None]:
    """Who is shown the outputs of a micro-batch: puts what the task answers into `rows`."""

    def seen(micro_batch: MicroBatch, outputs: object) -> None:
        answers = {name: tensor.detach().cpu() for name, tensor in task.answers(outputs, micro_batch.inputs).items()}
        for name, tensor in answers.items():
            if tensor.dim() == 0 or tensor.shape[0] != len(micro_batch.samples):
                raise ConfigError(
                    f"answers have a row a sample, but {name} of {type(task).__name__} has shape "
                    f"{tuple(tensor.shape)} for {len(micro_batch.samples)} samples; keep dim 0"
                )
        rows.append((micro_batch.samples, answers))

    return seen


def _scored(world: World, task: Scored, rows: Rows) -> Score:
    """The score of all rows of all ranks, the same on every rank. Collective."""
    place = world.program.place
    first = place.shard == 0 and place.context == 0  # the others of a replica have the same answers
    gathered = to_first(rows if first else [], rank=place.rank, world_size=place.world_size)
    if world.workers is not None:
        gathered = [own for of_worker in world.workers.values(gathered) for own in of_worker]
    score = Score()
    if place.rank == 0:
        answers, indices = _in_order([row for own in gathered for row in own])
        score = task.score(answers, indices, "held_out")
    return from_first(score, world_size=place.world_size)


def _in_order(rows: Rows) -> tuple[Mapping[str, Sequence[torch.Tensor]], tuple[int, ...]]:
    """name -> [sample] of all samples, by their numbers, and these."""
    samples = {
        index: {name: tensor[row] for name, tensor in answers.items()}
        for indices, answers in rows
        for row, index in enumerate(indices)
    }
    assert len(samples) == sum(len(indices) for indices, _ in rows), "a sample was answered twice"
    indices = tuple(sorted(samples))
    names = list(samples[indices[0]]) if indices else []
    return {name: [samples[index][name] for index in indices] for name in names}, indices
