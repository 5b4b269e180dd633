"""One layout on one rank: laid out as `shardwise train` does it, memory at the peak of a step, steps by the clock.

    laid_out(task)    once: the program, its first steps, what the rank holds      timed(s), timed(s), …    ended()

Between calls the rank keeps its program and sleeps, so that a layout is visited several times while others are timed.
Everything returned is plain numbers. Knows nothing of predictions.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time

import torch
import torch.distributed as dist

from benchmarks.planner.local_layouts import Plans
from benchmarks.planner.local_models import GLOBAL_BATCH, SETTINGS
from shardwise.execute.assemble import assemble, fill_from
from shardwise.execute.batches import split
from shardwise.execute.process_memory import proportional_bytes
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.trace.deferred import defer
from shardwise.trace.placing import place
from shardwise.train.memory import PeakMemory
from shardwise.train.optimizer import optimizer_of
from shardwise.train.run_tables import TrainingOptions
from shardwise.train.update import update

__all__ = ["Held", "Task", "Timed", "ended", "laid_out", "timed"]

_WARM_UP = 3  # trace, first touch of memory, first exchange
_WATCHED = 2  # steps whose peak counts
_LEAST = 3  # steps that are timed at once


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A layout of a model."""

    model: str
    layout: Layout
    plans: Plans


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of one rank before the model was made, and at the peak of a step; the loss of that step."""

    before_bytes: int
    peak_bytes: int
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Of one rank: seconds of steps; of the parts of a step (medians): until the last action, in sums behind it, in the
    norm and the update."""

    steps: tuple[float, ...]
    computed_s: float
    sums_s: float
    update_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Of one step."""

    step_s: float
    computed_s: float
    sums_s: float
    update_s: float
    loss: float


class _Run:
    """The program of this rank, and its optimizer."""

    def __init__(self, context: RankContext, task: Task) -> None:
        layout, setting = task.layout, SETTINGS[task.model]
        blueprint = defer(setting.model, seed=0)
        model = blueprint.module
        place(model, blueprint.materialize([name for name, _ in model.named_buffers(remove_duplicate=False)]))
        count = layout.num_micro_batches(GLOBAL_BATCH)
        parts = split(setting.batch(), micro_batches=count, replicas=layout.num_replicas, weights=weigher(model))
        self.program = assemble(
            model,
            parts[0][0].inputs,
            layout=layout,
            rank=context.rank,
            num_micro_batches=count,
            fill=fill_from(blueprint.materialize, "cpu"),
            tensor=task.plans.tensor,
            experts=task.plans.experts,
            context=task.plans.context,
        )
        self._mine = parts[self.program.place.replica]
        self._options = TrainingOptions(steps=10_000, global_batch=GLOBAL_BATCH, learning_rate=1e-4)
        self._optimizer = optimizer_of(self.program)
        self._number = 0
        self.once_s = 0.0

    def step(self) -> _Part:
        start = time.perf_counter()
        result = self.program.step(self._mine, step=self._number)
        done = time.perf_counter()
        norm = self.program.gradient_norm()
        update(self.program, self._optimizer, self._options, step=self._number, norm=norm)
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        self._number += 1
        end = time.perf_counter()
        return _Part(
            step_s=end - start,
            computed_s=done - start - result.sums_s,
            sums_s=result.sums_s,
            update_s=end - done,
            loss=result.loss,
        )


_runs: list[_Run] = []  # what this rank keeps between calls


def laid_out(context: RankContext, task: Task) -> Held:
    """Collective; every rank is told the same task."""
    torch.set_num_threads(1)
    peak = PeakMemory(torch.device("cpu"))
    before = proportional_bytes(context.world_size)
    run = _Run(context, task)
    _runs.append(run)
    for _ in range(_WARM_UP):
        run.step()
    peak.begin_again()
    for _ in range(_WATCHED):
        part = run.step()
    peak.look()
    gc.collect()
    slowest = torch.tensor(part.step_s)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    run.once_s = float(slowest)
    return Held(before_bytes=before, peak_bytes=peak.nbytes, loss=part.loss)


def timed(context: RankContext, seconds: float) -> Timed:
    """So many seconds of steps of what was laid out last, three steps at least. Collective."""
    run = _runs[-1]
    dist.barrier()
    parts = [run.step() for _ in range(max(_LEAST, round(seconds / run.once_s)))]
    return Timed(
        steps=tuple(part.step_s for part in parts),
        computed_s=statistics.median(part.computed_s for part in parts),
        sums_s=statistics.median(part.sums_s for part in parts),
        update_s=statistics.median(part.update_s for part in parts),
    )


def ended(context: RankContext) -> None:
    """Closes what was laid out."""
    while _runs:
        _runs.pop().program.close()
