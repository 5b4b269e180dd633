"""Steps of a run one after another, with their updates: each drained before the next one begins, or not.

The loop is given steps that are done; how many are under way meanwhile is known here alone. Refuses to know what the
figures of a step are good for.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from shardwise.execute.continuous import Stream
from shardwise.execute.moments import Clock, Moments, clock_of
from shardwise.execute.program import StepResult
from shardwise.train.asynchronous.outer import Outer
from shardwise.train.asynchronous.workers import Numbers, Workers
from shardwise.train.build import World
from shardwise.train.memory import memory_of_ranks
from shardwise.train.update import update

__all__ = ["Done", "Parts", "steps_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Seconds of a step on this rank: until it had its samples, until its last action was done, and of the update.

    On a device the update is timed by marks that are read when somebody asks.
    """

    start_s: float
    data_s: float
    clock: Clock
    updating: tuple[Any, Any]  # marks around the update

    def computed_s(self, moments: Moments) -> float:
        """From the beginning of the step to the end of its last action."""
        return moments[-1].end_s - self.start_s if len(moments) else self.data_s

    @property
    def optimizer_s(self) -> float:
        return self.clock.between(*self.updating)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A step whose update has been made."""

    step: int
    result: StepResult
    norm: float  # of all gradients, before they were clipped
    seconds: float
    memory_bytes: Sequence[int]  # by rank
    parts: Parts | None = None  # of a step that was drained


def steps_of(world: World, *, end: int, pauses: Callable[[int], bool]) -> Iterator[Done]:
    """All steps from `world.first_step` to before `end`. Behind a step of which `pauses(step)` is true nothing is under
    way when it is given, and the parameters have their newest values."""
    if world.stream is not None:
        return _continuous(world, world.stream, end, pauses)
    if world.workers is not None and world.outer is not None:
        return _of_workers(world, world.workers, world.outer, end, pauses)
    return _drained(world, end)


def _drained(world: World, end: int) -> Iterator[Done]:
    for step in range(world.first_step, end):
        yield _step(world, step)


def _step(world: World, step: int) -> Done:
    program, optimizer, options = world.program, world.optimizer, world.run.training
    clock = clock_of(world.device)
    start = time.perf_counter()
    samples = world.micro_batches(step)
    data_s = time.perf_counter() - start
    result = program.step(samples, step=step)
    norm = program.gradient_norm()
    begun = clock.now()
    update(program, optimizer, options, step=step, norm=norm)
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    parts = Parts(start_s=start, data_s=data_s, clock=clock, updating=(begun, clock.now()))
    seconds = time.perf_counter() - start
    memory_bytes = memory_of_ranks(program.place, world.device)
    return Done(step=step, result=result, norm=norm, seconds=seconds, memory_bytes=memory_bytes, parts=parts)


def _of_workers(
    world: World, workers: Workers, outer: Outer, end: int, pauses: Callable[[int], bool]
) -> Iterator[Done]:
    """Steps are told when those of the other workers are known: behind an exchange, or a pause. No worker waits for
    another one between two exchanges; what a stale rule sends is waited for behind the next one."""
    recent: list[Done] = []
    untold: list[tuple[list[Done], Numbers]] = []
    steps = world.run.training.steps
    for step in range(world.first_step, end):
        done = _step(world, step)
        start, sent_before = time.perf_counter(), outer.sent_bytes
        exchanged = outer.step_done(step, tokens=done.result.weight, last=step + 1 == steps)
        sent_bytes = {**done.result.sent_bytes, "dp.exchange": outer.sent_bytes - sent_before}
        recent.append(
            dataclasses.replace(
                done,
                result=dataclasses.replace(done.result, sent_bytes=sent_bytes),
                seconds=done.seconds + time.perf_counter() - start,
            )
        )
        pausing = pauses(step) or step + 1 == steps
        if exchanged or pausing:
            numbers = workers.numbers([(each.result.loss, each.result.weight, each.norm) for each in recent])
            untold.append((recent, numbers))
            recent = []
        while untold and (pausing or len(untold) > outer.rule.stale):
            yield from _of_all(*untold.pop(0))


def _of_all(own: Sequence[Done], numbers: Numbers) -> Iterator[Done]:
    """Steps of this worker with loss and weight of all workers, and the mean of their norms."""
    for done, (loss, weight, norm) in zip(own, numbers.wait(), strict=True):
        yield dataclasses.replace(done, result=dataclasses.replace(done.result, loss=loss, weight=weight), norm=norm)


def _continuous(world: World, stream: Stream, end: int, pauses: Callable[[int], bool]) -> Iterator[Done]:
    following = world.micro_batches(world.first_step) if world.first_step < end else None
    for step in range(world.first_step, end):
        batch = following if following is not None else world.micro_batches(step)
        following = None if step + 1 == end or pauses(step) else world.micro_batches(step + 1)
        for done in stream.step(step, batch, following):
            yield Done(
                step=done.step,
                result=StepResult(done.loss, done.weight, done.moments, sent_bytes=done.sent_bytes),
                norm=done.norm,
                seconds=done.seconds,
                memory_bytes=[int(number) for number in done.told],
            )
