"""One kernel that is timed, and its time: repeated for a while, so that ranks which share cores all get their turns.

Knows one device and the clock; refuses to know what is computed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from shardwise.describe.kernels import Kernel

__all__ = ["Case", "Run", "dtype_name", "seconds_of"]

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel; `make` allocates what it works on, and gives what is timed, which is `count` of the kernel."""

    kernel: Kernel
    make: Callable[[], Run]
    what: str = ""
    count: Callable[[Run], int] = lambda run: 1


def seconds_of(run: Run, device: torch.device, *, window_s: float) -> float:
    """Of one `run`: the mean over those that fit into `window_s`, at least one, after one that warms up."""
    begin = _now(device)
    run()
    once_s = _now(device) - begin
    each = max(1, int(window_s / 8 / max(once_s, 1e-9)))  # between two looks at the clock
    runs, start = 0, _now(device)
    while True:
        for _ in range(each):
            run()
        runs += each
        passed_s = _now(device) - start
        if passed_s >= window_s:
            return passed_s / runs


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def dtype_name(dtype: torch.dtype) -> str:
    """As kernels say it: "float32"."""
    return str(dtype).removeprefix("torch.")
