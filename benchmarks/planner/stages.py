"""The work of a row's stages: kernels, exchanges and parameters of its shard, as its stack cuts and computes them.

Written as a traced model's would be. Refuses to know rows and seconds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from benchmarks.planner.activations import logits_bytes, saved_bytes, transient_bytes
from benchmarks.planner.exchanges import arrived_exchanges, embedding_exchanges, head_exchanges, layer_exchanges
from benchmarks.planner.kernels import attention_kernels, embedding_kernels, head_kernels, layer_kernels
from benchmarks.planner.partition import shares_of
from benchmarks.planner.shapes import Shard
from benchmarks.planner.stacks import Stack
from shardwise.describe.kernels import Exchange, Kernel, KernelKind, Phase
from shardwise.layout import Layout
from shardwise.plan.stage_work import StageWork

__all__ = ["stages_of"]


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
def _layer(shard: Shard, stack: Stack, dtype: str, recompute: str) -> tuple[tuple[Kernel, ...], tuple[Exchange, ...]]:
    exchanges = layer_exchanges(shard, recomputed=recompute == "full", hidden=stack.hides_shards)
    return layer_kernels(shard, stack, dtype), exchanges


@functools.lru_cache(maxsize=65536)
def _stage(
    shard: Shard, stack: Stack, recompute: str, dtype: str, layers: int, first: bool, head: bool, staged: bool
) -> StageWork:
    """Without its place and what it sends."""
    arch = shard.arch
    kernels, exchanges = _layer(shard, stack, dtype, recompute)
    works: list[Kernel] = [kernel.times(layers) for kernel in kernels if layers]
    again = _again(works, recompute, stack, shard, layers, dtype)
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


def _again(
    works: Sequence[Kernel], recompute: str, stack: Stack, shard: Shard, layers: int, dtype: str
) -> tuple[Kernel, ...]:
    """Forward kernels of layers that run again before the backward. "selective": all of attention between the products
    of its layer, or, where a compiler chooses what to keep, every second product and what only passes over memory."""
    forward = [kernel for kernel in works if kernel.phase is Phase.FORWARD]
    if recompute == "full":
        return tuple(forward)
    if recompute == "none":
        return ()
    if stack.every_second:
        products = [kernel for kernel in forward if kernel.kind is KernelKind.MATMUL and kernel.batch_dims == (1,)]
        passes = [kernel for kernel in forward if kernel.kind is KernelKind.MEMORY]
        return (*passes, *products[::2])
    core = [kernel for kernel in attention_kernels(shard, stack, dtype) if kernel.phase is Phase.FORWARD]
    return tuple(kernel.times(layers) for kernel in core if layers)
