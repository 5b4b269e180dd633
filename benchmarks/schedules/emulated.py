"""Emulated compute: pipelines of 4, 8 and 16 ranks whose actions sleep, held against their own simulation.

Simulated twice: with the seconds that were slept, so that all that the executor adds is an error, and with what actions
and transfers of the step before took, as `shardwise train` predicts its steps.

Knows cases, what a rank does, and figures; what sleeps, and how, is in `pauses`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.schedules.pauses import WIDTH, Pausing, emulating, set_costs, waking_sharply
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.plan.sources import GivenSource
from shardwise.schedule import Costs, Kind, Schedule, Span, Timeline, chain, generate, parse, placement, simulate
from shardwise.schedule.measured_costs import measured_costs
from shardwise.schedule.search import search

__all__ = ["Case", "Ran", "cases", "costs_of", "figures", "line", "row_of", "run_case"]

TEXTBOOK = ("1f1b", "interleaved", "zb-h1", "zb-v")
WARM_UP_STEPS = 1  # behind the step whose gradients are looked at
SHORTEST_S, LONGEST_S = 5e-3, 20e-3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A schedule, and the seconds that F, I and W of each of its stages sleep."""

    even: bool
    schedule: Schedule
    costs: Costs
    bound_s: float | None = None  # no schedule of these stages is faster; known of searched ones

    @property
    def simulated_s(self) -> float:
        return simulate(self.schedule, costs=self.costs).seconds


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What one rank measured, by the clock of the host: when its steps began and ended, and when every action of the
    step before them had its inputs and ended."""

    starts: tuple[float, ...]
    ends: tuple[float, ...]
    before: tuple[tuple[str, float, float], ...]


def costs_of(num_stages: int, *, even: bool, seed: int = 0) -> Costs:
    """Every action takes 5 to 20 ms; a whole backward as long as its I and W.

    Even: F = I = W = 10 ms. Uneven: F = I of every stage between 6.25 and 11.1 ms, drawn evenly, W = 0.8 of it.
    """
    chosen = random.Random(seed)
    longest = LONGEST_S / 1.8
    seconds = [10e-3 if even else chosen.uniform(SHORTEST_S / 0.8, longest) for _ in range(num_stages)]
    weight = tuple((1.0 if even else 0.8) * s for s in seconds)
    return Costs(
        compute_seconds={
            Kind.F: tuple(seconds),
            Kind.I: tuple(seconds),
            Kind.W: weight,
            Kind.B: tuple(i + w for i, w in zip(seconds, weight, strict=True)),
        }
    )


def cases(num_ranks: int, *, even: bool, search_s: float) -> list[Case]:
    """Every schedule of `TEXTBOOK`, and one that is searched for with `search_s` seconds; 2 micro-batches a rank."""
    num_micro_batches = 2 * num_ranks
    made = []
    for name in TEXTBOOK:
        schedule = generate(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
        costs = costs_of(schedule.num_stages, even=even)
        made.append(Case(even=even, schedule=schedule, costs=costs))
    costs = costs_of(num_ranks, even=even)
    ranks = placement("1f1b", num_ranks=num_ranks)
    found = search(costs, num_micro_batches=num_micro_batches, ranks=ranks, seconds=search_s)
    made.append(Case(even=even, schedule=found.schedule, costs=costs, bound_s=found.lower_bound_s))
    return made


def run_case(context: RankContext, case: Case, steps: int) -> Ran:
    """Steps of a case on this rank. Raises `AssertionError` for gradients that are not those of one process."""
    torch.set_num_threads(1)
    with emulating():
        return _run(context, case, steps)


def _run(context: RankContext, case: Case, steps: int) -> Ran:
    schedule = case.schedule
    model = Pausing(schedule.num_stages)
    batch = _batch(schedule.num_micro_batches)
    model(**batch).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    layout = Layout(
        pp=schedule.num_ranks,
        micro_batches=schedule.num_micro_batches,
        schedule="searched",
        chunks=schedule.num_stages // schedule.num_ranks,
        stages=tuple((f"layers.{stage}",) for stage in range(schedule.num_stages)),
    )
    sample = {name: tensor[:1] for name, tensor in batch.items()}
    given = GivenSource(schedule=schedule)
    program = assemble(model, sample, layout=layout, rank=context.rank, schedule=given)
    parts = split(batch, micro_batches=schedule.num_micro_batches, replicas=1, weights=lambda _: 1.0)[0]
    program.step(parts, step=0)
    for name, parameter in program.parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)
    set_costs(program.parameters, case.costs)
    starts, ends = [], []
    with waking_sharply():
        for step in range(1, 1 + WARM_UP_STEPS + steps):
            for parameter in program.parameters.values():
                parameter.grad = None
            dist.barrier()
            starts.append(time.perf_counter())
            result = program.step(parts, step=step)
            ends.append(time.perf_counter())
            if step == WARM_UP_STEPS:
                before = tuple((str(m.action), m.ready_s, m.end_s) for m in result.moments)
    program.close()
    return Ran(starts=tuple(starts[WARM_UP_STEPS:]), ends=tuple(ends[WARM_UP_STEPS:]), before=before)


def row_of(case: Case, ranks: Sequence[Ran]) -> dict[str, Any]:
    """Seconds of a step, from the first rank's start to the last one's end: measured (median), simulated from what was
    slept, predicted from the step before, bound."""
    starts = [min(step) for step in zip(*(ran.starts for ran in ranks), strict=True)]
    ends = [max(step) for step in zip(*(ran.ends for ran in ranks), strict=True)]
    seconds = [end - start for start, end in zip(starts, ends, strict=True)]
    measured = statistics.median(seconds)
    predicted = _predicted_s(case.schedule, ranks)
    actions = max(len(row) for row in case.schedule.actions)
    return {
        "ranks": case.schedule.num_ranks,
        "stages": "even" if case.even else "uneven",
        "schedule": case.schedule.name if case.bound_s is None else "searched",
        "micro_batches": case.schedule.num_micro_batches,
        "measured_s": measured,
        "slowest_s": max(seconds),
        "simulated_s": case.simulated_s,
        "predicted_s": predicted,
        "error": measured / predicted - 1.0,
        "error_of_slept": measured / case.simulated_s - 1.0,
        "us_per_action": (measured - case.simulated_s) / actions * 1e6,
        "over_bound": None if case.bound_s is None else measured / case.bound_s - 1.0,
    }


def _predicted_s(schedule: Schedule, ranks: Sequence[Ran]) -> float:
    """The simulation with what actions and transfers of the step before took, by the clock of this host."""
    spans = [
        Span(rank=rank, action=parse(action), start_s=ready_s, end_s=end_s)
        for rank, ran in enumerate(ranks)
        for action, ready_s, end_s in ran.before
    ]
    edges = chain(schedule.num_stages)
    timeline = Timeline(num_ranks=schedule.num_ranks, spans=spans)
    return simulate(schedule, edges, costs=measured_costs(timeline, schedule, edges)).seconds


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    over = "" if row["over_bound"] is None else f"{row['over_bound']:+10.1%}"
    return (
        f"  {row['ranks']:5} {row['stages']:7} {row['schedule']:12} {row['measured_s'] * 1e3:7.1f} ms "
        f"{row['simulated_s'] * 1e3:7.1f} ms {row['error_of_slept']:+7.1%} {row['predicted_s'] * 1e3:7.1f} ms "
        f"{row['error']:+7.1%}  {over}"
    )


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The worst of all rows."""
    return {
        "simulator_error": round(max(abs(row["error"]) for row in rows), 4),
        "simulator_error_of_slept": round(max(abs(row["error_of_slept"]) for row in rows), 4),
        "searched_over_bound": round(max(row["over_bound"] for row in rows if row["over_bound"] is not None), 4),
    }


def _batch(num_samples: int) -> dict[str, torch.Tensor]:
    random_numbers = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(num_samples, WIDTH, generator=random_numbers),
        "labels": torch.randn(num_samples, WIDTH, generator=random_numbers),
    }
