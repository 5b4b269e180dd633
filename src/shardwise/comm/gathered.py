"""Values of all ranks, on rank 0, in the order of ranks; and one of rank 0, on all. For what is small and seldom.

Knows the default process group; refuses to know what the values are.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

__all__ = ["from_first", "to_first"]

T = TypeVar("T")


def to_first(own: T, *, rank: int, world_size: int) -> list[T]:
    """What each rank gave, on rank 0; nothing elsewhere. Collective; the values are pickled."""
    if world_size == 1:
        return [own]
    everybody: list[T | None] = [None] * world_size
    dist.gather_object(own, everybody if rank == 0 else None, dst=0)
    return [each for each in everybody if each is not None] if rank == 0 else []


def from_first(own: T, *, world_size: int) -> T:
    """What rank 0 gave. Collective; the value is pickled."""
    told = [own]
    if world_size > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0]
