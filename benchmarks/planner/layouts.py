"""What a row says of its layout: replicas, micro-batches, shards, stages' schedule, what is computed again.

What it leaves open is inferred by rule. Refuses to know seconds and bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re

from benchmarks.planner.rows import Row
from benchmarks.planner.shapes import Architecture, Shard
from benchmarks.planner.stacks import Stack
from shardwise.describe.tensor import SequenceParallel
from shardwise.layout import Layout

__all__ = ["layout_of", "mended", "micro_batch_of", "recompute_of", "replicas_of", "shard_of"]

# What tables call schedules, without marks; some names say nothing without their number of chunks.
_SCHEDULES = (
    ("zb2p", "zb-h2"),
    ("zbh2", "zb-h2"),
    ("zb1p", "zb-h1"),
    ("zbh1", "zb-h1"),
    ("zbv", "zb-v"),
    ("gpipe", "gpipe"),
    ("afab", "gpipe"),
    ("allforward", "gpipe"),
    ("loopedbfs", "looped-bfs"),
    ("breadthfirst", "looped-bfs"),
)
_OF_CHUNKS = ("looped-bfs", "zb-v")


def mended(row: Row) -> Row:
    """The row, or without a pipeline where no such one fits on its GPUs, so that it was misread."""
    if row.n_gpus is None or row.tp * row.pp * row.cp <= row.n_gpus:
        return row
    return dataclasses.replace(row, pp=1, vpp=1)


def replicas_of(row: Row) -> int:
    """What the row says, or what its GPUs leave."""
    return row.dp or max(1, (row.n_gpus or 1) // (row.tp * row.pp * row.cp))


def micro_batch_of(row: Row, dp: int, stack: Stack) -> int:
    """What the row says; else a sample, or, where the stack cuts batches by stages, what makes as many as those."""
    if row.micro_batch or not stack.cuts_by_stages or row.global_batch_seqs is None:
        return row.micro_batch or 1
    return max(1, row.global_batch_seqs // dp // max(1, row.pp))


def shard_of(row: Row, arch: Architecture, samples: int) -> Shard:
    """What one rank of the row's tensor and context axes computes for `samples`; the row has a sequence length."""
    assert row.seq_len is not None
    return Shard(
        arch=arch,
        samples=samples,
        sequence=math.ceil(row.seq_len / row.cp),
        whole=row.seq_len,
        tp=row.tp,
        cp=row.cp,
        ep=row.ep,
        sp=row.sp,
    )


def layout_of(row: Row, arch: Architecture, dp: int, count: int) -> Layout:
    """The row's axes; replicas that divide state are the layout's fsdp: all, or groups of as many as the row says.

    Raises `LayoutError` where they do not fit."""
    ep = math.gcd(row.ep, dp)
    replicas = dp // ep
    divided = math.gcd(row.divided_among or replicas, replicas) if row.zero_stage >= 1 else 1
    counted = (arch.layers, arch.layers + 2)  # or embedding and head as layers
    chunks = row.vpp if row.pp > 1 and any(layers % (row.pp * row.vpp) == 0 for layers in counted) else 1
    return Layout(
        dp=replicas // divided,
        fsdp=divided,
        zero=max(1, row.zero_stage),
        ep=ep,
        pp=row.pp,
        tp=row.tp,
        cp=row.cp,
        sequence_parallel=SequenceParallel.OFF,  # tokens between products are in the work of the stages
        micro_batches=count,
        schedule=schedule_of(row, chunks),
        chunks=chunks if chunks > 1 else None,
    )


def schedule_of(row: Row, chunks: int) -> str:
    """The row's schedule among ours."""
    if row.pp == 1:
        return "1f1b"
    told = re.sub(r"[^a-z0-9]", "", row.schedule.lower())
    named = next((ours for name, ours in _SCHEDULES if told.startswith(name)), None)
    if named is not None and (chunks > 1) == (named in _OF_CHUNKS):
        return named
    return "interleaved" if chunks > 1 else "1f1b"


def recompute_of(row: Row, stack: Stack) -> str:
    """none, selective or full, from what the row says."""
    text = row.recompute.lower()
    if "full" in text:
        return "full"
    if "selective" in text:
        return "selective"
    return stack.inferred if not text else "none"
