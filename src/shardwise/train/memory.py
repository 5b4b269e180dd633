"""What ranks hold in memory, now and at most. Knows devices; refuses to know what it is held for."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from shardwise.execute.place import Place
from shardwise.execute.process_memory import forget_peak, peak_resident_bytes, proportional_bytes, resident_bytes

__all__ = ["PeakMemory", "memory_of_ranks", "own_memory"]

_LOOKS_S = 20.0  # between two looks at what ranks share, each of which takes milliseconds


class PeakMemory:
    """The most that this rank held since it was made, or since `begin_again`: on a GPU all that is taken of it; else of
    the host's memory, where pages that n ranks map (libraries, buffers that they exchange by) count as an n-th; all
    ranks are taken to be on one host.

    What is shared hardly changes from step to step, so that it is looked at now and then. Where the system does not
    forget an older peak (elsewhere than on Linux), of the whole process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shared_bytes = 0
        self._looked_s: float | None = None
        self.begin_again()

    def begin_again(self) -> None:
        """Forget what was held before."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            forget_peak()

    @property
    def nbytes(self) -> int:
        """Bytes at most until now."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            beside = total - free - torch.cuda.memory_reserved(self._device)
            return int(torch.cuda.max_memory_reserved(self._device) + beside)
        now_s = time.monotonic()
        if self._looked_s is None or now_s - self._looked_s > _LOOKS_S:
            self.look()
        return peak_resident_bytes() - self._shared_bytes

    def look(self) -> None:
        """How much of what is resident others' shares are, from now on."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._shared_bytes = max(0, resident_bytes() - proportional_bytes(ranks))
        self._looked_s = time.monotonic()


def own_memory(device: torch.device) -> int:
    """Bytes of this rank: resident memory, or on a GPU what torch has allocated at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes()


def memory_of_ranks(place: Place, device: torch.device) -> list[int]:
    """Bytes of every rank, by rank. Collective."""
    if place.world_size == 1:
        return [own_memory(device)]
    of_ranks = torch.zeros(place.world_size, dtype=torch.int64, device=device)
    of_ranks[place.rank] = own_memory(device)
    dist.all_reduce(of_ranks)
    return [int(number) for number in of_ranks.tolist()]
