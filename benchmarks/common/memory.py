"""The resident set of this process, its peak, and how both are put back. Knows no benchmark. Linux."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

__all__ = ["forget_peak", "peak_bytes", "resident_bytes", "trim"]


def resident_bytes() -> int:
    """Bytes that are resident now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most bytes that were resident since the process began, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Give back what is free, and begin again to look for the peak."""
    trim()
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Collect garbage and give free memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
