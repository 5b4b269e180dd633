"""What ranks hold in memory, now and at most. Knows devices; refuses to know what it is held for."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from shardwise.execute.place import Place

__all__ = ["PeakMemory", "memory_of_ranks", "own_memory"]

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the peak of resident memory becomes what is resident now


class PeakMemory:
    """The most that this rank held since it was made, or since `begin_again`: resident memory, on a GPU all that is
    taken of it. Where the system does not forget an older peak (elsewhere than on Linux), of the whole process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin_again()

    def begin_again(self) -> None:
        """Forget what was held before."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):
            _REFERENCES.write_text(_RESET_PEAK, encoding="ascii")

    @property
    def nbytes(self) -> int:
        """Bytes at most until now."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            beside = total - free - torch.cuda.memory_reserved(self._device)
            return int(torch.cuda.max_memory_reserved(self._device) + beside)
        try:
            told = _STATUS.read_text(encoding="ascii")
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(told.partition("VmHWM:")[2].split()[0]) * 1024


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
