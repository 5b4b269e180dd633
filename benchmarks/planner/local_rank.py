"""One layout on one rank: laid out as `shardwise train` does it, steps by the clock, memory at the peak of a step.

Everything returned is plain numbers. Knows nothing of predictions.
"""

from __future__ import annotations

import dataclasses
import gc
import time

import torch
import torch.distributed as dist

from benchmarks.planner.local_layouts import Plans
from benchmarks.planner.local_models import GLOBAL_BATCH, SETTINGS
from shardwise.execute.assemble import assemble, fill_from
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.process_memory import proportional_bytes
from shardwise.execute.program import Program
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.trace.deferred import defer
from shardwise.trace.placing import place
from shardwise.train.memory import PeakMemory
from shardwise.train.optimizer import optimizer_of
from shardwise.train.run_tables import TrainingOptions
from shardwise.train.update import update

__all__ = ["Measured", "Task", "measured"]

_WARM_UP = 3  # trace, first touch of memory, first exchange
_WATCHED = 2  # steps whose peak counts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A layout of a model. timed_s: how long steps are timed, of which there are `least` at least; 0: not at all."""

    model: str
    layout: Layout
    plans: Plans
    timed_s: float = 2.5
    least: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Of one rank: seconds of steps; bytes before the model was made, and at the peak of a step; of the parts of the
    step (medians): seconds until the last action, in sums behind it, in the norm and the update."""

    steps: tuple[float, ...]
    before_bytes: int
    peak_bytes: int
    computed_s: float
    sums_s: float
    update_s: float
    loss: float


def measured(context: RankContext, task: Task) -> Measured:
    """Collective; every rank is told the same task."""
    torch.set_num_threads(1)
    peak = PeakMemory(torch.device("cpu"))
    before = proportional_bytes(context.world_size)
    layout, setting = task.layout, SETTINGS[task.model]
    blueprint = defer(setting.model, seed=0)
    model = blueprint.module
    place(model, blueprint.materialize([name for name, _ in model.named_buffers(remove_duplicate=False)]))
    count = layout.num_micro_batches(GLOBAL_BATCH)
    parts = split(setting.batch(), micro_batches=count, replicas=layout.num_replicas, weights=weigher(model))
    program = assemble(
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
    try:
        return _steps(program, parts[program.place.replica], task, peak, before)
    finally:
        program.close()


def _steps(program: Program, mine: tuple[MicroBatch, ...], task: Task, peak: PeakMemory, before_bytes: int) -> Measured:
    options = TrainingOptions(steps=10_000, global_batch=GLOBAL_BATCH, learning_rate=1e-4)
    optimizer = optimizer_of(program)
    number = 0

    def step() -> tuple[float, float, float, float, float]:
        nonlocal number
        start = time.perf_counter()
        result = program.step(mine, step=number)
        done = time.perf_counter()
        norm = program.gradient_norm()
        update(program, optimizer, options, step=number, norm=norm)
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        number += 1
        end = time.perf_counter()
        return end - start, done - start - result.sums_s, result.sums_s, end - done, result.loss

    for _ in range(_WARM_UP):
        once_s, *_, loss = step()
    peak.begin_again()
    for _ in range(_WATCHED):
        once_s, *_, loss = step()
    peak.look()
    peak_bytes = peak.nbytes
    gc.collect()
    times = torch.tensor(once_s)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    wanted = max(task.least, int(task.timed_s / float(times))) if task.timed_s else 0
    dist.barrier()
    seconds = [step() for _ in range(wanted)]
    middle = [sorted(column)[len(column) // 2] for column in zip(*seconds, strict=True)] or [0.0] * 5
    return Measured(
        steps=tuple(each[0] for each in seconds),
        before_bytes=before_bytes,
        peak_bytes=peak_bytes,
        computed_s=middle[1],
        sums_s=middle[2],
        update_s=middle[3],
        loss=loss,
    )
