"""A row of a table as a job: the work of its stages, its layout and how many micro-batches, ready to be priced.

    Row ──architecture_of──► Architecture ──stages_of──► StageWork of every stage
        ──layout_of────────► Layout

Refuses to know seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from benchmarks.planner.architectures import architecture_of
from benchmarks.planner.devices import device_of, dtype_of
from benchmarks.planner.layouts import layout_of, mended, micro_batch_of, recompute_of, replicas_of, shard_of
from benchmarks.planner.rows import Row
from benchmarks.planner.shapes import Architecture
from benchmarks.planner.stacks import Stack, stack_of
from benchmarks.planner.stages import stages_of
from shardwise.errors import ShardwiseError
from shardwise.layout import Layout
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.stage_work import StageWork

__all__ = ["Case", "case_of"]

CHANNELS = 16  # that NCCL deals the collectives of a group out to, one each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A row, ready to be priced."""

    row: Row
    architecture: Architecture
    stack: Stack
    stages: tuple[StageWork, ...]
    layout: Layout
    job: Job
    num_micro_batches: int


def case_of(row: Row, others: Sequence[Row] = ()) -> Case | None:
    """The case of a row, or None where it states too little. others: rows of the same source, for what is open."""
    row = mended(row)
    arch = architecture_of(row, others)
    stack = stack_of(row)
    if arch is None or device_of(row.gpu) is None or not row.global_batch_seqs or not row.seq_len or not row.n_gpus:
        return None
    dp = replicas_of(row)
    count = max(1, round(row.global_batch_seqs / (dp * micro_batch_of(row, dp, stack))))
    try:
        layout = layout_of(row, arch, dp, count)
    except ShardwiseError:
        return None
    samples = max(1, round(row.global_batch_seqs / (dp * count)))
    shard = shard_of(row, arch, samples)
    per = PerParameter(parameter=2, gradient=stack.summed_bytes, master=4, optimizer=8)
    tensors = arch.tensors(math.ceil(arch.layers / layout.pp))
    job = Job(
        global_batch=dp * count * samples,
        per_parameter=per,
        overlap_replicas=stack.overlap and (stack.overlap_divided or layout.fsdp == 1),
        reduce_bytes=stack.wire_bytes,
        step_kernels=stack.step_kernels * tensors,
        reduce_calls=max(1.0, tensors / CHANNELS) if stack.by_tensor else 1.0,
    )
    stages = stages_of(
        shard,
        stack,
        layout,
        recompute_of(row, stack),
        dtype=dtype_of(row.precision, row.gpu),
        embeddings_are_layers=row.ends_are_layers,
    )
    return Case(row=row, architecture=arch, stack=stack, stages=stages, layout=layout, job=job, num_micro_batches=count)
