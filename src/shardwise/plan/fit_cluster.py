"""A `Cluster` from what a machine was measured to do: the coefficients with which `price` says the measured seconds.

    device     rates: the best that was measured (of a GPU of the catalogue, what is promised); shares of them, what a
               product needs besides, from all shapes at once
    link       bandwidth and latency, from all kinds, sizes and groups at once
    overheads  of one action, one step, one kernel

Everything is fitted to the medians of all rounds, and to each round alone, which says how far it can be trusted. On a
device that starts its own kernels (a CPU), the program's part of every kernel delays it, and belongs to the kernel's
constant; elsewhere it is `kernel_s`, which a slower device hides. Refuses to know how it was measured.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from shardwise.describe.catalogue import find_device
from shardwise.describe.cluster import Cluster, Device, Efficiency, Hosts, Link, Overheads
from shardwise.describe.kernels import KernelKind
from shardwise.describe.measured import TINY, UPDATE, ExchangeTime, KernelTime, MachineTimes, PeakBytes
from shardwise.errors import ConfigError
from shardwise.plan.compute import KernelTable, kernel_seconds
from shardwise.plan.fit_coefficients import (
    delayed,
    divided_s,
    exchange_times_s,
    filled,
    kernels_s,
    of_blocks,
    of_divided,
    of_kernels,
    of_link,
)

__all__ = ["Coefficient", "FittedCluster", "Residual", "fit_cluster", "held_of"]

_DIGITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coefficient:
    """What was fitted to all rounds together, and the least and the most of what each round alone would give."""

    name: str
    value: float
    least: float
    most: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """Of one kind of measurement: how many there are, and the median and the largest relative error of the formula."""

    what: str
    count: int
    median: float
    largest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedCluster:
    """The cluster, where its numbers come from, and how well they say what was measured."""

    cluster: Cluster
    coefficients: tuple[Coefficient, ...]
    residuals: tuple[Residual, ...]


def fit_cluster(times: MachineTimes, *, on_gpu: bool = False) -> FittedCluster:
    """The machine as `times.ranks` ranks find it that all compute at once."""
    rounds = range(max(len(times.kernels[0].seconds), len(times.program.action_s)))
    promised = _promised(times, on_gpu)
    whole = _coefficients(times, promised, on_gpu, None)
    each = [_coefficients(times, promised, on_gpu, number) for number in rounds]
    device = dataclasses.replace(promised, efficiency=filled(Efficiency(), whole))
    link = filled(_link(times), whole)
    overheads = filled(Overheads(), whole)
    framework, slack = held_of(times.peaks) or (times.program.framework_bytes, 0.0)
    overheads = dataclasses.replace(overheads, framework_bytes=round(framework), slack=_rounded(slack))
    cluster = Cluster(
        hosts=(
            Hosts(device=device, devices=times.ranks, processors=None if on_gpu else min(times.ranks, times.cores)),
        ),
        links=(link,),
        overheads=overheads,
        name=f"{times.ranks} ranks on {times.cores} cores" if not on_gpu else f"{times.ranks} x {times.device}",
    )
    coefficients = tuple(
        Coefficient(
            name=name,
            value=value,
            least=min(value, *(one[name] for one in each)),
            most=max(value, *(one[name] for one in each)),
        )
        for name, value in whole.items()
    )
    return FittedCluster(
        cluster=cluster, coefficients=coefficients, residuals=_residuals(times, device, link, overheads)
    )


def held_of(peaks: Sequence[PeakBytes]) -> tuple[float, float] | None:
    """Bytes of a rank before a model is there, and of what comes and goes the share that the allocator holds besides,
    from steps that differ in what comes and goes; None where nothing is told apart."""
    if len(peaks) < 2:
        return None
    passing = np.array([peak.passing for peak in peaks])
    left = np.array([peak.measured - peak.states for peak in peaks])
    slope, _ = np.polyfit(passing, left, 1)
    slack = max(0.0, float(slope) - 1.0)
    return max(0.0, float(np.mean(left - (1.0 + slack) * passing))), slack


# -- rates --------------------------------------------------------------------------------------------


def _promised(times: MachineTimes, on_gpu: bool) -> Device:
    """What shares are shares of: the best that was seen, unless the catalogue knows what the maker says."""
    best: dict[str, float] = {}
    for time in _bare(times, KernelKind.MATMUL):
        best[time.kernel.dtype] = max(best.get(time.kernel.dtype, 0.0), time.kernel.flops / time.median_s)
    stream = max(_bare(times, KernelKind.MEMORY), key=lambda time: time.kernel.nbytes)  # fits no cache
    device = Device(
        name=times.device,
        memory_bytes=times.memory_bytes,
        flops_per_s={dtype: _rounded(rate) for dtype, rate in best.items()},
        bytes_per_s=_rounded(stream.kernel.nbytes / stream.median_s),
    )
    if not on_gpu:
        return device
    try:
        known = find_device(times.device).device
    except ConfigError:
        return device
    return dataclasses.replace(known, memory_bytes=times.memory_bytes)


def _bare(times: MachineTimes, kind: KernelKind) -> list[KernelTime]:
    return [time for time in _kernels(times) if time.kernel.kind is kind]


def _kernels(times: MachineTimes) -> list[KernelTime]:
    return [time for time in times.kernels if time.what not in (TINY, UPDATE)]


# -- all coefficients of one round, or of the medians of all ------------------------------------------


def _coefficients(times: MachineTimes, promised: Device, on_gpu: bool, number: int | None) -> dict[str, float]:
    """By the names of the fields that they are."""

    def of(seconds: Sequence[float]) -> float:
        return statistics.median(seconds) if number is None else seconds[number % len(seconds)]

    kernels = _kernels(times)
    found = of_kernels(kernels, [of(time.seconds) for time in kernels], promised)
    launched = [of(time.seconds) for time in times.kernels if time.what == TINY]
    if launched and on_gpu:
        found["kernel_s"] = launched[0]
    elif times.blocks:
        found |= of_blocks(times.blocks, [of(time.seconds) for time in times.blocks], promised, found)
    elif launched:
        found |= delayed(promised, found, launched[0])
    updates = [time.kernel.nbytes / of(time.seconds) for time in times.kernels if time.what == UPDATE]
    if updates:
        found["update"] = min(1.0, statistics.median(updates) / promised.bytes_per_s)
    exchanges = [time for time in times.exchanges if time.chosen]
    if exchanges:
        found |= of_link(exchanges, [of(time.seconds) for time in exchanges], _link(times))
    if times.hidden:
        found["overlap"] = of(times.hidden)
    if times.divided:
        device = dataclasses.replace(promised, efficiency=filled(Efficiency(), found))
        seconds = [of(time.seconds) for time in times.divided]
        found |= of_divided(times.divided, seconds, device, filled(_link(times), found))
    found["action_s"] = max(0.0, of(times.program.action_s))  # differences of noisy numbers
    found["step_s"] = max(0.0, of(times.program.step_s))
    return {name: _rounded(value) for name, value in found.items()}


# -- the link, and how well all of it fits ------------------------------------------------------------


def _link(times: MachineTimes) -> Link:
    """Its rate is the best that was seen of what leaves a rank in an exchange."""
    chosen = [time for time in times.exchanges if time.chosen]
    best = max((_moved(time) / time.median_s for time in chosen), default=1e9)
    ways = sorted({time.way.partition(",")[0] for time in chosen})
    return Link(name=" and ".join(ways) or "no other rank", bytes_per_s=_rounded(best), latency_s=0.0, efficiency=1.0)


def _moved(time: ExchangeTime) -> float:
    """Bytes that leave a rank in a ring; as far as formulas know, no link is faster."""
    unit = Link(name="unit", bytes_per_s=1.0, latency_s=0.0, efficiency=1.0)
    return float(exchange_times_s([time], unit)[0])


def _residuals(times: MachineTimes, device: Device, link: Link, overheads: Overheads) -> tuple[Residual, ...]:
    """Of kernels alone: what a program adds to each is left out again."""
    bare = _kernels(times)
    own = filled(Efficiency(), of_kernels(bare, [time.median_s for time in bare], device))
    priced = kernel_seconds(KernelTable.of([time.kernel for time in bare]), dataclasses.replace(device, efficiency=own))
    rows = [(_kind_of(time), float(seconds), time.median_s) for time, seconds in zip(bare, priced, strict=True)]
    rows += [
        (f"block {time.what.partition(' ')[0]}", kernels_s(time.kernels, device), time.median_s)
        for time in times.blocks
    ]
    rows += [("divided", divided_s(time, device, link, overheads), time.median_s) for time in times.divided[1:]]
    chosen = [time for time in times.exchanges if time.chosen]
    rows += [
        (f"{time.kind} of {time.group}", float(seconds), time.median_s)
        for time, seconds in zip(chosen, exchange_times_s(chosen, link) if chosen else (), strict=True)
    ]
    found = []
    for what in dict.fromkeys(row[0] for row in rows):
        errors = [abs(priced_s / measured_s - 1) for name, priced_s, measured_s in rows if name == what]
        found.append(Residual(what=what, count=len(errors), median=statistics.median(errors), largest=max(errors)))
    return tuple(found)


def _kind_of(time: KernelTime) -> str:
    return f"{time.kernel.kind} {time.kernel.dtype}" if time.kernel.kind is not KernelKind.MEMORY else "memory"


def _rounded(value: float) -> float:
    """What is fitted to noise has so many digits."""
    if value <= 0:
        return 0.0
    digits = _DIGITS - 1 - math.floor(math.log10(value))
    return round(value, digits)
