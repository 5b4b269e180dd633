"""What an executor costs beside the computing: actions that compute next to nothing, ours and torch's, in turn.

Two ranks, one tiny linear layer a stage, the same actions for both. The overhead of an action is (seconds of a step on
the slower rank - seconds of the same forwards and backwards called by hand) / actions of the rank. Knows no files.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.plan.sources import GivenSource
from shardwise.schedule import Schedule

__all__ = ["NUM_MICRO_BATCHES", "OURS", "Measured", "figures", "line", "measured"]

WIDTH = 8
NUM_MICRO_BATCHES = 32
WARM_UP_STEPS = 3
OURS, TORCH, BARE = "shardwise", "torch", "by hand"

Batch = Mapping[str, torch.Tensor]
Step = Callable[[Batch], object]


class _Layers(nn.Module):
    """x and labels (samples, WIDTH); one layer a stage."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_stages))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(x, labels)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one rank: contender -> seconds of every step by the clock, and seconds that the process computed in it."""

    wall_s: Mapping[str, Sequence[float]]
    cpu_s: Mapping[str, Sequence[float]]


def measured(context: RankContext, schedule: Schedule, rounds: int) -> Measured:
    """Steps of both executors, and the same work by hand, in turn. Raises `AssertionError` where gradients differ."""
    torch.set_num_threads(1)
    batch = _batch(schedule.num_micro_batches)
    makers = {OURS: _ours, TORCH: _torch, BARE: _by_hand}
    models = {name: _Layers(schedule.num_stages) for name in makers}
    steps = {name: make(models[name], schedule, context.rank) for name, make in makers.items()}
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step(batch)
    wall_s: dict[str, list[float]] = {name: [] for name in steps}
    cpu_s: dict[str, list[float]] = {name: [] for name in steps}
    names = tuple(steps)
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            for parameter in models[name].parameters():
                parameter.grad = None
            dist.barrier()
            start, computed = time.perf_counter(), time.process_time()
            steps[name](batch)
            wall_s[name].append(time.perf_counter() - start)
            cpu_s[name].append(time.process_time() - computed)
    _assert_same(models[OURS], models[TORCH], schedule.ranks[context.rank])
    return Measured(wall_s=wall_s, cpu_s=cpu_s)


def figures(schedule: Schedule, ranks: Sequence[Measured]) -> dict[str, Any]:
    """Microseconds an action: by the clock on the slower rank, and of computing on all ranks."""
    actions = max(len(row) for row in schedule.actions)
    all_actions = sum(len(row) for row in schedule.actions)
    wall_us = {name: _wall_us([ran.wall_s for ran in ranks], name, actions) for name in (OURS, TORCH)}
    cpu_us = {name: _cpu_us([ran.cpu_s for ran in ranks], name, all_actions) for name in (OURS, TORCH)}
    return {
        "schedule": schedule.name,
        "ranks": schedule.num_ranks,
        "actions": actions,
        "by_hand_us": statistics.median(ranks[0].wall_s[BARE]) / actions * 1e6,
        "wall_us": wall_us,
        "cpu_us": cpu_us,
        "wall_ratio": wall_us[OURS] / wall_us[TORCH],
        "cpu_ratio": cpu_us[OURS] / cpu_us[TORCH],
    }


def line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    wall, cpu = row["wall_us"], row["cpu_us"]
    return (
        f"  {row['ranks']} ranks {row['schedule']:8} "
        f"wall {wall[OURS]:7.1f} / {wall[TORCH]:7.1f} = {row['wall_ratio']:.3f}   "
        f"cpu {cpu[OURS]:7.1f} / {cpu[TORCH]:7.1f} = {row['cpu_ratio']:.3f}"
    )


def _wall_us(ranks: Sequence[Mapping[str, Sequence[float]]], name: str, actions: int) -> float:
    rounds = range(len(ranks[0][name]))
    left = [max(rank[name][i] for rank in ranks) - max(rank[BARE][i] for rank in ranks) for i in rounds]
    return statistics.median(left) / actions * 1e6


def _cpu_us(ranks: Sequence[Mapping[str, Sequence[float]]], name: str, actions: int) -> float:
    rounds = range(len(ranks[0][name]))
    left = [sum(rank[name][i] - rank[BARE][i] for rank in ranks) for i in rounds]
    return statistics.median(left) / actions * 1e6


def _ours(model: _Layers, schedule: Schedule, rank: int) -> Step:
    layout = Layout(
        pp=schedule.num_ranks,
        micro_batches=schedule.num_micro_batches,
        schedule="searched",
        chunks=schedule.num_stages // schedule.num_ranks,
        stages=tuple((f"layers.{stage}",) for stage in range(schedule.num_stages)),
    )
    sample = {"x": torch.zeros(1, WIDTH), "labels": torch.zeros(1, WIDTH)}
    program = assemble(model, sample, layout=layout, rank=rank, schedule=GivenSource(schedule=schedule))
    count = 0

    def step(batch: Batch) -> object:
        nonlocal count
        count += 1
        parts = split(batch, micro_batches=schedule.num_micro_batches, replicas=1, weights=lambda _: 1.0)[0]
        return program.step(parts, step=count)

    return step


def _torch(model: _Layers, schedule: Schedule, rank: int) -> Step:
    """torch's runtime, given our actions."""
    mine = schedule.ranks[rank]
    device = torch.device("cpu")
    untyped: Any = _PipelineScheduleRuntime
    stages = [PipelineStage(model.layers[index], index, schedule.num_stages, device) for index in mine]
    runtime: Any = untyped(stages, schedule.num_micro_batches, loss_fn=F.mse_loss)
    owners = dict(enumerate(schedule.owners))
    runtime.stage_index_to_group_rank = owners
    for stage in stages:
        stage.stage_index_to_group_rank = owners
    rows = {r: [_Action.from_str(str(action)) for action in row] for r, row in enumerate(schedule.actions)}
    runtime.pipeline_order = rows
    runtime._prepare_schedule_with_comms(rows)
    first, last = 0 in mine, schedule.num_stages - 1 in mine

    def step(batch: Batch) -> object:
        inputs = (batch["x"],) if first else ()
        if not last:
            return runtime.step(*inputs)
        losses: list[torch.Tensor] = []
        runtime.step(*inputs, target=batch["labels"], losses=losses, return_outputs=False)
        return float(torch.stack(losses).mean().item())

    return step


def _by_hand(model: _Layers, schedule: Schedule, rank: int) -> Step:
    """Forwards and backwards of the rank's stages on made-up inputs; whole backwards, also where a schedule splits."""
    layers = [(stage, model.layers[stage]) for stage in schedule.ranks[rank]]
    between = torch.randn(1, WIDTH)

    def step(batch: Batch) -> object:
        for x, labels in zip(torch.split(batch["x"], 1), torch.split(batch["labels"], 1), strict=True):
            for stage, layer in layers:
                own = x if stage == 0 else between.detach().requires_grad_()
                out = layer(own)
                if stage == schedule.num_stages - 1:
                    torch.autograd.backward(F.mse_loss(out, labels))
                else:
                    torch.autograd.backward(out, between)
        return None

    return step


def _assert_same(ours: _Layers, theirs: _Layers, stages: Sequence[int]) -> None:
    for stage in stages:
        for one, other in zip(ours.layers[stage].parameters(), theirs.layers[stage].parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def _batch(num_samples: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(2)
    return {name: torch.randn(num_samples, WIDTH, generator=numbers) for name in ("x", "labels")}
