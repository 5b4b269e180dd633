"""What a process holds of the host's memory: resident, its share of what processes map together, and the most of both.

    resident       every page that it maps, libraries too: ranks that share them count them all
    proportional   a page that n ranks map counts as an n-th: summed over the ranks of a host nothing counts twice

Of memory that processes share (buffers that ranks exchange by, what a fork has left) the system knows who maps it; of
libraries it also counts processes that have nothing to do with the run, so these are divided among the ranks. Linux
tells all of it (proc(5)); elsewhere all is resident, and a peak is that of the whole process. Knows no devices.
"""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import psutil

__all__ = ["forget_peak", "peak_resident_bytes", "proportional_bytes", "resident_bytes"]

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SHARES = Path("/proc/self/smaps_rollup")
_RESET_PEAK = "5"  # the peak of resident memory becomes what is resident now


def resident_bytes() -> int:
    """Now."""
    return int(psutil.Process().memory_info().rss)


def proportional_bytes(ranks: int = 1) -> int:
    """Now, where `ranks` processes of a run are on this host. The system walks all pages for it: milliseconds."""
    try:
        shares, told = _SHARES.read_text(encoding="ascii"), _STATUS.read_text(encoding="ascii")
    except OSError:
        return resident_bytes()
    if "Pss_Anon:" not in shares:  # before Linux 5.4
        return _field(shares, "Pss:")
    return _field(shares, "Pss_Anon:") + _field(shares, "Pss_Shmem:") + _field(told, "RssFile:") // ranks


def peak_resident_bytes() -> int:
    """At most since the process began, or since `forget_peak`."""
    try:
        told = _STATUS.read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _field(told, "VmHWM:")


def forget_peak() -> None:
    """From now on the peak is of what follows, where the system can forget."""
    with contextlib.suppress(OSError):
        _REFERENCES.write_text(_RESET_PEAK, encoding="ascii")


def _field(told: str, name: str) -> int:
    return int(told.partition(name)[2].split()[0]) * 1024
