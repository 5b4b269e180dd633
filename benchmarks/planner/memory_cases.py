"""A row as what its ranks hold: the stages' bytes by its stack, and every moment of every place of the pipeline.

    Row ──architecture, stack──► StageWork, bytes alone ──plan.memory.moments──► Held: lines of every place and moment

Refuses to know seconds, and what is fitted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.planner.activations import (
    Keeps,
    keeps_of,
    logits_bytes,
    saved_bytes,
    transient_bytes,
    weight_bytes,
)
from benchmarks.planner.architectures import architecture_of
from benchmarks.planner.layouts import layout_of, mended, micro_batch_of, recompute_of, replicas_of, shard_of
from benchmarks.planner.partition import Share, shares_of
from benchmarks.planner.rows import Row
from benchmarks.planner.shapes import Shard
from benchmarks.planner.stacks import Stack, stack_of
from shardwise.errors import ShardwiseError
from shardwise.layout import Layout
from shardwise.plan.in_flight import kept_micro_batches
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.lines import MemoryLines
from shardwise.plan.memory import moments
from shardwise.plan.stage_work import StageWork
from shardwise.schedule import generate, placement

__all__ = ["LINES", "Held", "held_of"]

LINES = ("states", "activations", "gathered", "working")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What a row's ranks hold, in bytes: (places, moments, lines of `LINES`). "gathered" is what activations grow by
    where gathered inputs are kept as such, "working" what one unit or the loss needs while it computes. again: of every
    place, whether forwards take memory that backwards have freed. runs: "", or the rule by which it cannot."""

    row: Row
    bytes: NDArray[np.float64]
    again: NDArray[np.bool_]
    runs: str


def held_of(row: Row, others: Sequence[Row] = ()) -> Held | None:
    """None where the row states too little."""
    row = mended(row)
    arch, stack = architecture_of(row, others), stack_of(row)
    if arch is None or not row.global_batch_seqs or not row.seq_len or not row.n_gpus:
        return None
    dp = replicas_of(row)
    count = max(1, round(row.global_batch_seqs / (dp * micro_batch_of(row, dp, stack))))
    try:
        layout = layout_of(row, arch, dp, count)
    except ShardwiseError:
        return None
    shares = shares_of(arch, layout.num_stages, stack, ends=row.ends_are_layers)
    keeps = keeps_of(stack)
    samples = max(1, round(row.global_batch_seqs / (dp * count)))
    shard = shard_of(row, arch, samples)
    job = Job(
        global_batch=dp * count * samples, per_parameter=_per_parameter(row, keeps), gradients_stay=keeps.gradients_stay
    )
    places = placement(layout.schedule, num_ranks=layout.pp, chunks=layout.num_stages // layout.pp)
    found = []
    for share in (0.0, 1.0):
        own = dataclasses.replace(keeps, gathered=share)
        stages = [_stage(shard, stack, own, each, recompute_of(row, stack)) for each in shares]
        alive = _alive(stages, layout, count)
        found.append([_moments(stages, alive, place, _states(layout, keeps), job, count) for place in places])
    return Held(
        row=row,
        bytes=_lines(*found),
        again=np.array([count > max(alive[stage] for stage in place) for place in places]),
        runs=_rule(row, stack, shares, count),
    )


def _per_parameter(row: Row, keeps: Keeps) -> PerParameter:
    """The stack's; where the row says that gradients are summed in float32, beside those of 16 bit."""
    per = keeps.per_parameter
    if "fp32 grad" not in row.precision or per.gradient >= 4:
        return per
    return dataclasses.replace(per, gradient=4, fresh=2, temporary=0)


def _states(layout: Layout, keeps: Keeps) -> Layout:
    """The layout as far as states are divided: among context ranks too, where the stack does so."""
    if not keeps.over_context or layout.cp == 1:
        return layout
    return dataclasses.replace(layout, fsdp=layout.fsdp * layout.cp, cp=1)


def _rule(row: Row, stack: Stack, shares: Sequence[Share], count: int) -> str:
    """The rule of the stack that the row breaks, or "". Those of nanotron's engine, and of any pipeline."""
    if any(share.blocks == 0 for share in shares):
        return "a stage without a block"
    if stack.split == "costs" and count < row.pp - 1:
        return "fewer micro-batches than stages - 1"
    return ""


def _stage(shard: Shard, stack: Stack, keeps: Keeps, share: Share, recompute: str) -> StageWork:
    arch = shard.arch
    vocab = shard.vocab(stack.padded_vocab) * arch.hidden
    dense = (arch.layer_parameters - arch.expert_parameters) // shard.tp
    experts = arch.expert_parameters // (shard.tp * shard.ep)
    tables = share.embedding + (share.head and not (share.embedding and arch.tied))
    parameters = share.layers * (dense + experts) + tables * vocab
    kept = saved_bytes(
        shard,
        stack,
        layers=share.layers,
        recompute=recompute,
        first=share.embedding,
        last=share.head,
        keeps=keeps,
    )
    return StageWork(
        stage=share.stage,
        parameters=parameters,
        trained=parameters,
        expert_parameters=share.layers * experts,
        expert_trained=share.layers * experts,
        unit_parameters=(*((dense + experts,) * share.layers), *((vocab,) * tables)),
        kernels=(),
        saved_bytes=kept,
        weight_bytes=min(kept, weight_bytes(shard, stack, layers=share.layers, keeps=keeps)),
        transient_bytes=transient_bytes(shard, stack, recompute=recompute, keeps=keeps),
        logits_bytes=logits_bytes(shard, stack, keeps=keeps) if share.head else 0.0,
    )


def _alive(stages: Sequence[StageWork], layout: Layout, count: int) -> tuple[float, ...]:
    """[s]: micro-batches that a stage keeps at its rank's peak."""
    chunks = layout.num_stages // layout.pp
    waiting = tuple(round(stage.weight_bytes / stage.saved_bytes, 3) if stage.saved_bytes else 0.0 for stage in stages)
    return _in_flight(layout.schedule, layout.pp, min(count, 3 * layout.num_stages), chunks, waiting)


def _moments(
    stages: Sequence[StageWork],
    alive: Sequence[float],
    place: Sequence[int],
    layout: Layout,
    job: Job,
    count: int,
) -> list[MemoryLines]:
    """Of one place of the pipeline."""
    return list(
        moments(
            [stages[stage] for stage in place],
            layout,
            job,
            num_micro_batches=count,
            in_flight=[alive[stage] for stage in place],
        ).values()
    )


@functools.lru_cache(maxsize=4096)
def _in_flight(schedule: str, ranks: int, count: int, chunks: int, waiting: tuple[float, ...]) -> tuple[float, ...]:
    """Micro-batches that every stage keeps at its rank's peak."""
    if schedule == "1f1b" and chunks == 1:
        return tuple(float(min(count, ranks - stage)) for stage in range(ranks))
    stages = [
        StageWork(stage=stage, parameters=0, trained=0, kernels=(), saved_bytes=1.0, weight_bytes=share)
        for stage, share in enumerate(waiting)
    ]
    count += -count % ranks if schedule == "interleaved" else 0
    return kept_micro_batches(generate(schedule, num_ranks=ranks, num_micro_batches=count, chunks=chunks), stages)


def _lines(as_shards: list[list[MemoryLines]], as_gathered: list[list[MemoryLines]]) -> NDArray[np.float64]:
    return np.array(
        [
            [_vector(few, many) for few, many in zip(place, other, strict=True)]
            for place, other in zip(as_shards, as_gathered, strict=True)
        ]
    )


def _vector(few: MemoryLines, many: MemoryLines) -> list[float]:
    states = few.parameters + few.gradients + few.masters + few.optimizer + few.buffers
    return [states, few.activations, many.activations - few.activations, few.transient + few.logits]
