"""What shards of a decoder exchange in a layer, at the embedding, at the head and between stages.

16-bit values are 2 bytes. Refuses to know seconds and layouts.
"""

from __future__ import annotations

import dataclasses

from benchmarks.planner.shapes import Shard
from shardwise.describe.kernels import Exchange, ExchangeKind, Phase

__all__ = ["arrived_exchanges", "embedding_exchanges", "head_exchanges", "layer_exchanges"]

F, B = Phase.FORWARD, Phase.INPUT


def layer_exchanges(shard: Shard, *, recomputed: bool, hidden: bool = True) -> tuple[Exchange, ...]:
    """Of one layer. tp: two sums forward and two backward (Shoeybi et al. 2019), as a gather and a scatter each where
    tokens are divided, with one more gather of what a weight's gradient needs (Korthikanti et al. 2022); hidden:
    whether that gather runs beside the product for the input, and the scatter beside that for the weight. cp: keys and
    values go round and their gradients back; ep: tokens go out and come back. A forward that is computed again
    exchanges all of its own once more."""
    arch = shard.arch
    found: list[Exchange] = []
    nbytes = 2 * shard.tokens * arch.hidden
    if shard.tp > 1 and shard.sp:
        found += [
            _exchange(ExchangeKind.ALL_GATHER, "tp", F, nbytes, 2),
            _exchange(ExchangeKind.REDUCE_SCATTER, "tp", F, nbytes, 2),
            _exchange(ExchangeKind.ALL_GATHER, "tp", B, nbytes, 2),
            _exchange(ExchangeKind.ALL_GATHER, "tp", B, nbytes, 2, hidden=hidden),
            _exchange(ExchangeKind.REDUCE_SCATTER, "tp", B, nbytes, 2, hidden=hidden),
        ]
    elif shard.tp > 1:
        found += [
            _exchange(ExchangeKind.ALL_REDUCE, "tp", F, nbytes, 2),
            _exchange(ExchangeKind.ALL_REDUCE, "tp", B, nbytes, 2),
        ]
    if shard.cp > 1:
        turns = shard.cp - 1
        around = 2 * 2 * shard.tokens * shard.kv_heads * arch.head_dim
        found += [
            _exchange(ExchangeKind.SEND, "cp", F, around, turns, hidden=True),
            _exchange(ExchangeKind.SEND, "cp", B, 2 * around, turns, hidden=True),
        ]
    if arch.experts and shard.ep > 1:
        out = 2 * shard.between * arch.hidden * arch.top_k
        found += [
            _exchange(ExchangeKind.ALL_TO_ALL, "ep", F, out, 2),
            _exchange(ExchangeKind.ALL_TO_ALL, "ep", B, out, 2),
        ]
    if recomputed:
        found += [dataclasses.replace(each, phase=B, again=True) for each in found if each.phase is F]
    return tuple(found)


def embedding_exchanges(shard: Shard) -> tuple[Exchange, ...]:
    """Each shard has some rows: their sum, which is scattered where tokens are divided."""
    if shard.tp == 1:
        return ()
    nbytes = 2 * shard.tokens * shard.arch.hidden
    if shard.sp:
        return (
            _exchange(ExchangeKind.REDUCE_SCATTER, "tp", F, nbytes, 1),
            _exchange(ExchangeKind.ALL_GATHER, "tp", B, nbytes, 1),
        )
    return (_exchange(ExchangeKind.ALL_REDUCE, "tp", F, nbytes, 1),)


def arrived_exchanges(shard: Shard, *, first: bool, last: bool) -> tuple[Exchange, ...]:
    """What came in parts from the stage before, and its gradient from the one behind, gathered among the shards."""
    nbytes = 2 * shard.tokens * shard.arch.hidden
    phases = (*(() if first else (F,)), *(() if last else (B,)))
    return tuple(_exchange(ExchangeKind.ALL_GATHER, "tp", phase, nbytes, 1) for phase in phases)


def head_exchanges(shard: Shard) -> tuple[Exchange, ...]:
    """Three sums over the vocabulary of one number a token, and what a layer's product needs."""
    if shard.tp == 1:
        return ()
    nbytes = 2 * shard.tokens * shard.arch.hidden
    sums = _exchange(ExchangeKind.ALL_REDUCE, "tp", F, 4 * shard.tokens, 3)
    if shard.sp:
        return (
            sums,
            _exchange(ExchangeKind.ALL_GATHER, "tp", F, nbytes, 1),
            _exchange(ExchangeKind.ALL_GATHER, "tp", B, nbytes, 1),
            _exchange(ExchangeKind.REDUCE_SCATTER, "tp", B, nbytes, 1),
        )
    return (sums, _exchange(ExchangeKind.ALL_REDUCE, "tp", B, nbytes, 1))


def _exchange(
    kind: ExchangeKind, axis: str, phase: Phase, nbytes: int, count: int, *, hidden: bool = False
) -> Exchange:
    return Exchange(kind=kind, axis=axis, phase=phase, nbytes=nbytes, count=count, hidden=hidden)
