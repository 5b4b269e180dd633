"""A model of some blocks by every way to divide its units: seconds of a micro-batch, and what it does meanwhile.

    dp=4     tp=2,dp=2     tp=2,dp=2 with sequence parallelism     cp=2,dp=2, ring and Ulysses     tp=4, …

What a divided micro-batch takes longer than the same kernels and exchanges by themselves is what the program adds:
functions of tokens that are dealt out, messages that are packed and waited for, ranks that compute unequally long. All
programs are alive at once and are visited in turns, so that what the machine does for a moment is in a visit of all.
Knows programs; refuses to know what is fitted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from shardwise.describe.context import ContextPlan
from shardwise.describe.kernels import Exchange, Kernel
from shardwise.describe.tensor import SequenceParallel, TensorPlan
from shardwise.execute.assemble import assemble, fill_from
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.probe_model import MICRO_BATCHES, ProbedModel, batch_of
from shardwise.execute.program import Program
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.layout import Context, Layout
from shardwise.schedule.actions import Kind
from shardwise.trace.deferred import defer
from shardwise.trace.placing import place

__all__ = ["DividedWay", "divided_seconds", "layouts_that_divide", "ways_to_divide"]

_TOKENS = 256  # of a sample
_MOST = 4  # ranks that divide a unit
_FIRST = 2  # steps that trace and touch memory
_LEAST = 3  # steps of a visit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DividedWay:
    """One way, and what one rank does for a micro-batch."""

    layout: Layout
    group: int  # ranks that divide a unit
    kernels: tuple[Kernel, ...]
    exchanges: tuple[Exchange, ...]
    tensor: TensorPlan | None = None
    context: ContextPlan | None = None


def ways_to_divide(ranks: int) -> tuple[DividedWay, ...]:
    """That many ranks, in every layout that divides: proven, and counted."""
    return tuple(_way(_profiles(), layout) for layout in layouts_that_divide(ranks))


@functools.cache
def _profiles() -> TracedProfiles:
    """Proven once for all numbers of ranks."""
    whole = batch_of(_TOKENS, 1)
    one = {name: each[:1] for name, each in whole.items()}
    return TracedProfiles(defer(lambda: ProbedModel(_TOKENS), seed=0).module, one, proof_batch=whole)


def layouts_that_divide(ranks: int) -> tuple[Layout, ...]:
    """Replicas, and every way to divide units among 2 ranks and among as many as there are, 4 at most."""
    found = [Layout(dp=ranks, micro_batches=MICRO_BATCHES)]
    for group in sorted({2, min(ranks, _MOST)}):
        if ranks % group:
            continue
        rest = Layout(dp=ranks // group, micro_batches=MICRO_BATCHES)
        for how in (SequenceParallel.OFF, SequenceParallel.ON):
            found.append(dataclasses.replace(rest, tp=group, sequence_parallel=how))
        found += [dataclasses.replace(rest, cp=group, context=how) for how in (Context.RING, Context.ULYSSES)]
    return tuple(found)


def _way(profiles: TracedProfiles, layout: Layout) -> DividedWay:
    (work,) = profiles.works(layout, 1)
    return DividedWay(
        layout=layout,
        group=max(layout.tp, layout.cp),
        kernels=work.kernels,
        exchanges=work.exchanges,
        tensor=profiles.tensor_plan(layout.tp, layout.sequence_parallel) if layout.tp > 1 else None,
        context=profiles.context_plan(layout) if layout.cp > 1 else None,
    )


def divided_seconds(ways: Sequence[DividedWay], *, visits: int, visit_s: float) -> list[tuple[float, ...]]:
    """[way]: of every visit, this rank's seconds of the forward and backward of a step's first micro-batch (median of
    the visit's steps): its gradients are added to nothing, and nobody sums them yet. Collective, on CPUs."""
    with contextlib.ExitStack() as stack:
        runs = [_Run(way, stack) for way in ways]
        for run in runs:
            run.seconds(_FIRST)
        times = [max(_LEAST, round(visit_s / _slowest(run))) for run in runs]
        found: list[list[float]] = [[] for _ in runs]
        for _ in range(visits):
            for place_of, run in enumerate(runs):
                dist.barrier()
                found[place_of].append(run.seconds(times[place_of]))
        dist.barrier()
    return [tuple(each) for each in found]


def _slowest(run: _Run) -> float:
    start = time.perf_counter()
    run.seconds(1)
    of_all = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(of_all, op=dist.ReduceOp.MAX)
    return float(of_all)


class _Run:
    """The program of this rank."""

    def __init__(self, way: DividedWay, stack: contextlib.ExitStack) -> None:
        blueprint = defer(lambda: ProbedModel(_TOKENS), seed=0)
        model = blueprint.module
        place(model, blueprint.materialize([name for name, _ in model.named_buffers()]))
        replicas = way.layout.num_replicas
        parts = split(
            batch_of(_TOKENS, replicas), micro_batches=MICRO_BATCHES, replicas=replicas, weights=lambda _: 1.0
        )
        self._program: Program = assemble(
            model,
            parts[0][0].inputs,
            layout=way.layout,
            rank=dist.get_rank(),
            fill=fill_from(blueprint.materialize, "cpu"),
            tensor=way.tensor,
            context=way.context,
        )
        stack.callback(self._program.close)
        self._mine: tuple[MicroBatch, ...] = parts[self._program.place.replica]
        self._number = 0

    def seconds(self, steps: int) -> float:
        """Of the first micro-batch, the median of so many steps, which update nothing."""
        found: list[float] = []
        for _ in range(steps):
            moments = self._program.step(self._mine, step=self._number).moments
            self._program.gradient_norm()
            for parameter in self._program.parameters.values():
                parameter.grad = None
            self._number += 1
            first = {each.action.kind: each.compute_s for each in reversed(moments)}
            found.append(first[Kind.F] + first[Kind.B])
        return statistics.median(found)
