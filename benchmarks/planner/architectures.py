"""A row of a table as a job: the work of its stages, its layout and how many micro-batches, ready to be priced.

    Row ──architecture_of──► Architecture ──stages_of──► StageWork of every stage
        ──layout_of────────► Layout

What a table leaves open is inferred by rule, never by a row's name: an architecture that is not stated from the
parameters in the model's name and the shapes of the same source. Refuses to know seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

from benchmarks.planner.activations import logits_bytes, saved_bytes, transient_bytes
from benchmarks.planner.devices import device_of, dtype_of
from benchmarks.planner.kernels import (
    arrived_exchanges,
    embedding_exchanges,
    embedding_kernels,
    head_exchanges,
    head_kernels,
    layer_exchanges,
    layer_kernels,
)
from benchmarks.planner.partition import shares_of
from benchmarks.planner.rows import Row
from benchmarks.planner.shapes import Architecture, Shard
from benchmarks.planner.stacks import Stack, stack_of
from shardwise.describe.kernels import Exchange, Kernel, KernelKind, Phase
from shardwise.describe.tensor import SequenceParallel
from shardwise.errors import ShardwiseError
from shardwise.layout import Layout
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.stage_work import StageWork

_VOCAB = 50257

__all__ = [
    "Case",
    "architecture_of",
    "case_of",
    "layout_of",
    "mended",
    "micro_batch_of",
    "recompute_of",
    "replicas_of",
    "shard_of",
]


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
    job = Job(
        global_batch=dp * count * samples,
        per_parameter=per,
        overlap_replicas=stack.overlap and (stack.overlap_divided or layout.fsdp == 1),
        reduce_bytes=stack.wire_bytes,
    )
    stages = stages_of(
        shard,
        stack,
        layout,
        recompute_of(row, stack),
        dtype=dtype_of(row.precision, row.gpu),
        embeddings_are_layers="embedding" in row.notes,
    )
    return Case(row=row, architecture=arch, stack=stack, stages=stages, layout=layout, job=job, num_micro_batches=count)


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
    text = row.schedule.lower()
    if row.pp == 1:
        return "1f1b"
    if text.startswith("zb-2p"):
        return "zb-h2"
    if text.startswith("zb-1p"):
        return "zb-h1"
    return "interleaved" if chunks > 1 else "1f1b"


def recompute_of(row: Row, stack: Stack) -> str:
    """none, selective or full, from what the row says."""
    text = row.recompute.lower()
    if "full" in text:
        return "full"
    if "selective" in text:
        return "selective"
    return stack.inferred if not text else "none"


def architecture_of(row: Row, others: Sequence[Row] = ()) -> Architecture | None:
    """What the row states, or what its source's other rows and the parameters in its name imply."""
    if row.layers and row.hidden and row.heads and row.vocab:
        head = row.head_dim or row.hidden // row.heads
        return Architecture(
            layers=row.layers,
            hidden=row.hidden,
            ffn=row.ffn_hidden or 4 * row.hidden,
            mats=row.mlp_mats or 2,
            heads=row.heads,
            kv_heads=row.kv_heads or row.heads,
            head_dim=head,
            vocab=row.vocab,
            tied=bool(row.tied),
        )
    return _inferred(row, others) or _completed(row)


def _completed(row: Row) -> Architecture | None:
    """Of a row that states its layers and their size alone: heads of 128 (or 64), GPT-2's vocabulary."""
    if not row.layers or not row.hidden or row.family != "dense":
        return None
    head = row.head_dim or (row.hidden // row.heads if row.heads else 128 if row.hidden % 128 == 0 else 64)
    heads = row.heads or max(1, row.hidden // head)
    return architecture_of(dataclasses.replace(row, heads=heads, head_dim=head, vocab=row.vocab or _VOCAB))


def _inferred(row: Row, others: Sequence[Row]) -> Architecture | None:
    """Of the nearest size among the source's rows that state theirs, with as many layers as give the parameters; a
    hidden size in the notes goes before it."""
    stated = [other for other in others if other.layers and other.hidden and other.vocab and other.file == row.file]
    if row.billions is None or not stated or row.family != "dense":
        return None
    size = row.billions
    noted = re.search(r"hidden (\d+)", row.notes)
    alike = [other for other in stated if noted and other.hidden == int(noted.group(1))] or stated
    nearest = min(alike, key=lambda other: abs(math.log((other.billions or size) / size)))
    model = architecture_of(nearest)
    if model is None:
        return None
    table = model.vocab * model.hidden * (1 if model.tied else 2)
    layers = max(row.pp, round((size * 1e9 - table) / model.layer_parameters))
    return dataclasses.replace(model, layers=layers)


def stages_of(
    shard: Shard, stack: Stack, layout: Layout, recompute: str, *, dtype: str, embeddings_are_layers: bool
) -> tuple[StageWork, ...]:
    """The work of every stage; equal ones are one object."""
    shares = shares_of(shard.arch, layout.num_stages, stack, ends=embeddings_are_layers)
    split = [(share.layers, share.head) for share in shares]
    last = layout.num_stages - 1
    head_at = next(index for index in range(last, -1, -1) if split[index][1] or index == 0)
    crossing = 2.0 * shard.tokens * shard.arch.hidden / (shard.tp if shard.sp or stack.scattered_sends else 1)
    return tuple(
        dataclasses.replace(
            _stage(shard, stack, recompute, dtype, layers, stage == 0, stage == head_at, last > 0),
            stage=stage,
            sends={stage + 1: crossing} if stage < last else {},
            gradients={stage + 1: crossing} if stage < last else {},
        )
        for stage, (layers, _) in enumerate(split)
    )


@functools.lru_cache(maxsize=65536)
def _layer(shard: Shard, stack: Stack, dtype: str) -> tuple[tuple[Kernel, ...], tuple[Exchange, ...]]:
    return layer_kernels(shard, stack, dtype), layer_exchanges(shard, recomputed=False)


@functools.lru_cache(maxsize=65536)
def _stage(
    shard: Shard, stack: Stack, recompute: str, dtype: str, layers: int, first: bool, head: bool, staged: bool
) -> StageWork:
    """Without its place and what it sends."""
    arch = shard.arch
    kernels, exchanges = _layer(shard, stack, dtype)
    if recompute == "full":
        exchanges = layer_exchanges(shard, recomputed=True)
    works: list[Kernel] = [dataclasses.replace(kernel, count=kernel.count * layers) for kernel in kernels if layers]
    again = _again(works, recompute, stack)
    moved = [dataclasses.replace(exchange, count=exchange.count * layers) for exchange in exchanges if layers]
    vocab = shard.vocab(stack.padded_vocab) * arch.hidden
    dense = (arch.layer_parameters - arch.expert_parameters) // shard.tp
    experts = layers * arch.expert_parameters // (shard.tp * shard.ep)
    tables = 0
    if first:
        works += embedding_kernels(shard, stack)
        moved += embedding_exchanges(shard)
        tables += vocab
    if head:
        works += head_kernels(shard, stack, dtype)
        moved += head_exchanges(shard)
        tables += 0 if first and arch.tied else vocab
    if staged and stack.scattered_sends and shard.tp > 1 and not shard.sp:
        moved += arrived_exchanges(shard, first=first, last=head)
    parameters = layers * dense + experts + tables
    ends = arch.tied and staged and first != head
    return StageWork(
        stage=0,
        parameters=parameters,
        trained=parameters,
        kernels=tuple(works),
        recomputed=again,
        exchanges=tuple(moved),
        expert_parameters=experts,
        expert_trained=experts,
        shared_parameters=vocab if ends else 0,
        unit_parameters=(*((dense + experts // max(1, layers),) * layers), *((vocab,) * (tables // vocab))),
        saved_bytes=saved_bytes(shard, stack, layers=layers, recompute=recompute, first=first, last=head),
        transient_bytes=transient_bytes(shard, stack, recompute=recompute),
        logits_bytes=logits_bytes(shard, stack) if head else 0.0,
    )


def _again(works: Sequence[Kernel], recompute: str, stack: Stack) -> tuple[Kernel, ...]:
    """Forward kernels of layers that run again before the backward. "selective": attention between its products, or,
    where a compiler chooses what to keep, every second product and all that only passes over memory."""
    forward = [kernel for kernel in works if kernel.phase is Phase.FORWARD]
    if recompute == "full":
        return tuple(forward)
    if recompute == "none":
        return ()
    products = [kernel for kernel in forward if kernel.kind is KernelKind.MATMUL and kernel.batch_dims == (1,)]
    if stack.every_second:
        passes = [kernel for kernel in forward if kernel.kind is KernelKind.MEMORY]
        return (*passes, *products[::2])
    return tuple(k for k in forward if k.kind is not KernelKind.MEMORY and k not in products)
