"""What ranks hold in memory now. Knows devices; refuses to know what it is held for."""

from __future__ import annotations

import psutil
import torch
import torch.distributed as dist

from shardwise.execute.place import Place

__all__ = ["memory_of_ranks", "own_memory"]


def own_memory(device: torch.device) -> int:
    """Bytes of this rank: resident memory, or on a GPU what torch has allocated at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def memory_of_ranks(place: Place, device: torch.device) -> list[int]:
    """Bytes of every rank, by rank. Collective."""
    if place.world_size == 1:
        return [own_memory(device)]
    of_ranks = torch.zeros(place.world_size, dtype=torch.int64, device=device)
    of_ranks[place.rank] = own_memory(device)
    dist.all_reduce(of_ranks)
    return [int(number) for number in of_ranks.tolist()]
