"""Passes: pure functions from a schedule to one with the same order of work and something added to it.

    split        B into I and W next to each other, or back
    gradients    G behind the last backward of a stage
    recompute    C ahead of the backward
    offload      O behind the forward, L some actions ahead of the backward
    shard        U ahead of the work of a stage, H behind it

Apply them in this order. Transfers are added last, by `transfers`, since they are not part of a schedule.
"""

from __future__ import annotations

from shardwise.schedule.passes.gradients import with_reductions
from shardwise.schedule.passes.offload import with_offload
from shardwise.schedule.passes.recompute import with_recompute
from shardwise.schedule.passes.shard import with_sharding
from shardwise.schedule.passes.split import merge_backwards, split_backwards

__all__ = [
    "merge_backwards",
    "split_backwards",
    "with_offload",
    "with_recompute",
    "with_reductions",
    "with_sharding",
]
