"""Held-out samples: their mean loss, and the score of what the model answers where its task has one.

    batches of held-out samples ──► loss stage of every replica: answers ──► rank 0: score ──► all ranks: figures
    a batch of rank 0's loop ──► all ranks ──► loss stage of every replica: replies ──► rank 0: the next batch, or score

The same figures on every layout: samples keep their numbers. Never asks which parallelism is on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch

from shardwise.comm.gathered import from_first, to_first
from shardwise.errors import ConfigError, DataflowError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.modes import evaluating
from shardwise.tasks import Batch, Game, Played, Score, Scored, Task
from shardwise.train.build import World

__all__ = ["check_outputs", "evaluate", "held_out_batches", "seeing"]

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
            seen = seeing(task, task.answers, rows) if isinstance(task, Scored) else None
            result = program.evaluate(world.held_out(indices), step=step, seen=seen)
            total, weight = total + result.loss * result.weight, weight + result.weight
        played = [_played(world, task, step)] if isinstance(task, Played) else []
    loss, weight = world.mean_over_workers(total / weight if weight else 0.0, weight)
    told: dict[str, object] = {"loss": loss, "weight": weight, **task.metrics(loss)}
    scores = [*([_scored(world, task, rows)] if isinstance(task, Scored) else []), *played]
    if scores:
        figures = {name: value for score in scores for name, value in score.figures.items()}
        report = "\n\n".join(score.report for score in scores if score.report)
        told |= {"samples": sum(map(len, batches)), "figures": figures, "report": report}
    emit("evaluation", step=step, **told)


def check_outputs(world: World) -> None:
    """Show the task what the model says of the first held-out samples, as evaluations will: what it reads of outputs
    that the stages of its loss do not have is told before the first step. Nothing where all outputs are in one place,
    and where nothing is evaluated. Collective. Raises ConfigError."""
    run, task = world.run, world.task
    asks = [task.answers] if isinstance(task, Scored) else []
    asks += [task.replies] if isinstance(task, Played) else []
    if run.layout.num_stages == 1 or not run.training.evaluate_every or not asks:
        return
    parts = world.num_replicas * run.num_micro_batches
    batches = held_out_batches(
        task.num_samples("held_out"), size=run.training.global_batch, num_batches=None, parts=parts
    )
    if not batches or len(batches[0]) < world.num_replicas:
        return
    shown = [seeing(task, ask, []) for ask in asks]

    def seen(micro_batch: MicroBatch, outputs: object) -> None:
        for show in shown:
            show(micro_batch, outputs)

    with evaluating(world.program.model):
        world.program.evaluate(world.held_out(batches[0]), step=world.first_step, seen=seen)


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


def seeing(
    task: Task, answers: Callable[[object, Batch], Mapping[str, torch.Tensor]], rows: Rows
) -> Callable[[MicroBatch, object], None]:
    """Who is shown the outputs of a micro-batch: puts what the task makes of them into `rows`."""

    def seen(micro_batch: MicroBatch, outputs: object) -> None:
        try:
            made = {name: tensor.detach().cpu() for name, tensor in answers(outputs, micro_batch.inputs).items()}
        except DataflowError as error:
            what, asks = str(error).partition(" is not on")[0], f"{type(task).__name__}.{answers.__name__}"
            raise ConfigError(
                f"{asks} reads {what}, which the loss does not need: the stage of the loss does not have it; read what "
                "the loss reads, let the loss read it too, or use pp=1"
            ) from error
        for name, tensor in made.items():
            if tensor.dim() == 0 or tensor.shape[0] != len(micro_batch.samples):
                raise ConfigError(
                    f"answers have a row a sample, but {name} of {type(task).__name__} has shape "
                    f"{tuple(tensor.shape)} for {len(micro_batch.samples)} samples; keep dim 0"
                )
        rows.append((micro_batch.samples, made))

    return seen


def _scored(world: World, task: Scored, rows: Rows) -> Score:
    """The score of all rows of all ranks, the same on every rank. Collective."""
    gathered = _gathered(world, rows)
    score = Score()
    if world.program.place.rank == 0:
        answers, indices = _in_order(gathered)
        score = task.score(answers, indices, "held_out")
    return from_first(score, world_size=world.program.place.world_size)


def _played(world: World, task: Played, step: int) -> Score:
    """The score of the task's loop, the same on every rank. The caller has set the model to evaluate. Collective."""
    place = world.program.place
    game = task.play("held_out") if place.rank == 0 else None
    replies: dict[str, torch.Tensor] | None = None
    while True:
        told = from_first(None if game is None else _next(game, replies), world_size=place.world_size)
        if isinstance(told, Score):
            return told
        assert told is not None
        rows: Rows = []
        world.program.evaluate(world.shown(told), step=step, seen=seeing(task, task.replies, rows))
        gathered = _gathered(world, rows)
        if game is not None:
            replies = {name: torch.stack(list(values)) for name, values in _in_order(gathered)[0].items()}


def _next(game: Game, replies: Mapping[str, torch.Tensor] | None) -> Batch | Score:
    """What the loop wants to be shown to the model next, or how it has ended."""
    try:
        return next(game) if replies is None else game.send(replies)
    except StopIteration as end:
        score: Score = end.value
        return score


def _gathered(world: World, rows: Rows) -> Rows:
    """Rows of all ranks, on rank 0; of worker 0's ranks those of all workers. Collective."""
    place = world.program.place
    first = place.shard == 0 and place.context == 0  # the others of a replica have the same answers
    gathered = to_first(rows if first else [], rank=place.rank, world_size=place.world_size)
    if world.workers is not None:
        gathered = [own for of_worker in world.workers.values(gathered) for own in of_worker]
    return [row for own in gathered for row in own]


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
