"""What a machine was measured to do: seconds of single operations and exchanges, each as often as it was measured.

Values between who measures (on ranks, with torch) and who fits a `Cluster` to them. Refuses to know both.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from shardwise.describe.kernels import Exchange, ExchangeKind, Kernel

__all__ = [
    "TINY",
    "UPDATE",
    "BlockTime",
    "DividedTime",
    "ExchangeTime",
    "KernelTime",
    "MachineTimes",
    "PeakBytes",
    "ProgramTime",
    "spread_of",
]

TINY = (
    "of a tiny block"  # `what` of a kernel that stands for all, at a size at which nothing but the program takes time
)
UPDATE = "update of parameters"  # … of an optimizer's pass over parameters


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """Seconds of one operation, in every round: the mean over the ranks, which all computed it at once.

    what: in words, what distinguishes it from kernels of the same shape.
    """

    kernel: Kernel
    seconds: tuple[float, ...]
    what: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockTime:
    """Seconds of a forward or a backward of a block, or of a whole model as a program, in every round, and all kernels
    that it is made of, with counts. weight: how much it counts where blocks are fitted."""

    what: str
    kernels: tuple[Kernel, ...]
    seconds: tuple[float, ...]
    weight: float = 1.0

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DividedTime:
    """Seconds of a forward and backward of a model whose units `group` ranks divide, in every visit: the mean of the
    ranks, and what one of them computes and exchanges meanwhile."""

    what: str
    group: int
    kernels: tuple[Kernel, ...]
    exchanges: tuple[Exchange, ...]
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeTime:
    """Seconds of one exchange, in every round: of the slowest rank. All ranks exchanged at once, in groups of `group`.

    way: what moved the bytes: "shared memory", "shared memory, in place", "gloo", "nccl". `chosen`: whether this is
    what programs use here.
    """

    kind: ExchangeKind
    group: int
    nbytes: int
    way: str
    seconds: tuple[float, ...]
    chosen: bool = True

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProgramTime:
    """The program around kernels, in every round, on the slowest rank: seconds for one action of a schedule and for one
    step beside its kernels; once, to start ranks and to lay a model out on them; bytes of a rank
    without a model."""

    action_s: tuple[float, ...]
    step_s: tuple[float, ...]
    start_s: float
    layout_s: float
    framework_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PeakBytes:
    """Memory of a rank at the peak of a step of some model: as measured, and of it by count what it holds all the time
    and what comes and goes."""

    states: float
    passing: float
    measured: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineTimes:
    """All of it, with `ranks` ranks at once on `cores` cores or as many GPUs, one thread a rank.

    device: its name; memory_bytes: of one; alone: the same kernels where one rank computes and the others are idle;
    peaks: of models whose activations are of several sizes, on the fullest rank; divided: of one model by every way to
    divide its units, the undivided first.
    """

    ranks: int
    cores: int
    device: str
    memory_bytes: int
    kernels: tuple[KernelTime, ...]
    exchanges: tuple[ExchangeTime, ...]
    program: ProgramTime
    alone: tuple[KernelTime, ...] = ()
    blocks: tuple[BlockTime, ...] = ()
    peaks: tuple[PeakBytes, ...] = ()
    hidden: tuple[float, ...] = ()  # of a sum of gradients beside products, the share that does not show
    divided: tuple[DividedTime, ...] = ()


def spread_of(values: Sequence[float]) -> float:
    """From the least to the most, as a share of the median: another measurement lies about so near."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0
