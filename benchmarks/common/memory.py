"""The resident set of this process, its peak, and how both are put back; and its share of what processes share.

Knows no benchmark. Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["forget_peak", "peak_bytes", "proportional_bytes", "resident_bytes", "trim", "watched_proportional"]

_BETWEEN_S = 0.005


def resident_bytes() -> int:
    """Bytes that are resident now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most bytes that were resident since the process began, or since `forget_peak`."""
    return _status("VmHWM")


def proportional_bytes() -> int:
    """Bytes that are resident now, where a page that n processes map counts as an n-th: summed over the processes of a
    host nothing counts twice."""
    return _field(Path("/proc/self/smaps_rollup"), "Pss")


@contextlib.contextmanager
def watched_proportional() -> Iterator[list[int]]:
    """Samples of `proportional_bytes` while the block runs, one every few milliseconds, at least one."""
    found: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            found.append(proportional_bytes())
            done.wait(_BETWEEN_S)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield found
    finally:
        done.set()
        watching.join()


def forget_peak() -> None:
    """Give back what is free, and begin again to look for the peak."""
    trim()
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Collect garbage and give free memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    return _field(Path("/proc/self/status"), field)


def _field(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {field}")
