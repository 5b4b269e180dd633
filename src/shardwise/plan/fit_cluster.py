"""A `Cluster` from what a machine was measured to do: the coefficients with which `price` says the measured seconds.

    device     rates: the best that was measured (of a GPU of the catalogue, what is promised); shares of them, what a
               product needs besides, from all shapes at once
    link       bandwidth and latency, from all kinds, sizes and groups at once
    overheads  of one action, one step, one kernel

Fitted are the formulas of `compute` and `collectives` themselves, to relative errors, robustly (soft L1), so that what
a formula does not know shows as a residual. On a device that starts its own kernels (a CPU), the program's part of
every kernel delays it, and belongs to the kernel's constant; elsewhere it is `kernel_s`, which a slower device hides.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import least_squares

from shardwise.describe.catalogue import find_device
from shardwise.describe.cluster import Cluster, Device, Efficiency, Hosts, Link, Overheads
from shardwise.describe.kernels import KernelKind
from shardwise.describe.measured import BlockTime, ExchangeTime, KernelTime, MachineTimes
from shardwise.errors import ConfigError
from shardwise.plan.collectives import KINDS, exchange_seconds_of
from shardwise.plan.compute import FloatArray, KernelTable, kernel_seconds

__all__ = ["TINY", "UPDATE", "Coefficient", "FittedCluster", "Residual", "fit_cluster"]

Fields = TypeVar("Fields", Efficiency, Link, Overheads)

TINY, UPDATE = "of a tiny block", "update of parameters"  # what is no kernel by itself; see `trace.probe_kernels`
_DIGITS = 4
_LEAST_SHARE = 0.005
_STRAYS = {"matmul": 3.0, "attention": 5.0, "memory": 10.0}  # so much less than an error of a block counts


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
    rounds = range(len(times.kernels[0].seconds))
    promised = _promised(times, on_gpu)
    whole, each = (
        _coefficients(times, promised, on_gpu, None),
        [_coefficients(times, promised, on_gpu, r) for r in rounds],
    )
    device = dataclasses.replace(promised, efficiency=_filled(Efficiency(), whole))
    link = _filled(_link(times), whole)
    overheads = _filled(Overheads(overlap=1.0 if on_gpu else 0.0), whole)
    overheads = dataclasses.replace(overheads, framework_bytes=times.program.framework_bytes)
    cluster = Cluster(
        hosts=(Hosts(device=device, devices=times.ranks),),
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
    return FittedCluster(cluster=cluster, coefficients=coefficients, residuals=_residuals(times, device, link))


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
    found = _of_kernels(kernels, [of(time.seconds) for time in kernels], promised)
    launched = [of(time.seconds) for time in times.kernels if time.what == TINY]
    if launched and on_gpu:
        found["kernel_s"] = launched[0]
    elif times.blocks:
        found |= _of_blocks(times.blocks, [of(time.seconds) for time in times.blocks], promised, found)
    elif launched:
        found |= _delayed(promised, found, launched[0])
    updates = [time.kernel.nbytes / of(time.seconds) for time in times.kernels if time.what == UPDATE]
    if updates:
        found["update"] = min(1.0, statistics.median(updates) / promised.bytes_per_s)
    exchanges = [time for time in times.exchanges if time.chosen]
    if exchanges:
        found |= _of_link(exchanges, [of(time.seconds) for time in exchanges], _link(times))
    found["action_s"] = max(0.0, of(times.program.action_s))  # differences of noisy numbers
    found["step_s"] = max(0.0, of(times.program.step_s))
    return {name: _rounded(value) for name, value in found.items()}


def _of_kernels(times: Sequence[KernelTime], measured: Sequence[float], promised: Device) -> dict[str, float]:
    table = KernelTable.of([time.kernel for time in times])
    least = min(measured)
    start = {
        "matmul": 0.8,
        "attention": 0.5,
        "memory": 0.5,
        "launch_s": least,
        "matmul_half_flops": least * promised.rate("float32"),
        "memory_half_bytes": least * promised.bytes_per_s,
    }
    ranges = {
        "matmul": (_LEAST_SHARE, 1.0),
        "attention": (_LEAST_SHARE, 1.0),
        "memory": (_LEAST_SHARE, 1.0),
        "launch_s": (least / 100, least * 1.5),
        "matmul_half_flops": (1.0, 1e4 * start["matmul_half_flops"]),
        "memory_half_bytes": (1.0, 1e4 * start["memory_half_bytes"]),
    }

    def seconds(values: Mapping[str, float]) -> FloatArray:
        return kernel_seconds(table, dataclasses.replace(promised, efficiency=_filled(Efficiency(), values)))

    return _fitted(seconds, np.array(measured), start, ranges)


def _of_blocks(
    times: Sequence[BlockTime], measured: Sequence[float], promised: Device, alone: Mapping[str, float]
) -> dict[str, float]:
    """Rates and the delay of every kernel with which the kernels of a block take as long as the block; near what they
    reach `alone`."""
    tables = [KernelTable.of(time.kernels) for time in times]
    counts = [np.array([kernel.count for kernel in time.kernels]) for time in times]
    start = {"matmul": alone["matmul"], "attention": alone["attention"], "memory": alone["memory"], "delay_s": 1e-5}
    ranges = {"matmul": (_LEAST_SHARE, 1.0), "attention": (_LEAST_SHARE, 1.0), "memory": (_LEAST_SHARE, 1.0)}
    ranges["delay_s"] = (1e-7, 1e-3)

    def whole(values: Mapping[str, float]) -> dict[str, float]:
        return {**alone, **values, **_delayed(promised, values, values["delay_s"])}

    def seconds(values: Mapping[str, float]) -> FloatArray:
        device = dataclasses.replace(promised, efficiency=_filled(Efficiency(), whole(values)))
        of_blocks = [n @ kernel_seconds(table, device) for table, n in zip(tables, counts, strict=True)]
        near = [(values[name] / alone[name]) ** (1 / _STRAYS[name]) for name in _STRAYS]
        return np.array([*of_blocks, *near])

    found = _fitted(seconds, np.array([*measured, *(1.0 for _ in _STRAYS)]), start, ranges)
    return {name: value for name, value in whole(found).items() if name != "delay_s"}


def _delayed(promised: Device, shares: Mapping[str, float], delay_s: float) -> dict[str, float]:
    """What is added to every kernel, as the flops or bytes that take as long."""
    return {
        "matmul_half_flops": delay_s * promised.rate("float32") * shares["matmul"],
        "memory_half_bytes": delay_s * promised.bytes_per_s * shares["memory"],
    }


def _of_link(times: Sequence[ExchangeTime], measured: Sequence[float], link: Link) -> dict[str, float]:
    least = min(measured)
    start = {"efficiency": 0.5, "latency_s": least / 4, "half_bytes": 1024.0, "meeting_s": least / 4}
    ranges = {
        "efficiency": (_LEAST_SHARE, 1.0),
        "latency_s": (1e-9, max(measured)),
        "half_bytes": (1.0, 1e8),
        "meeting_s": (1e-9, max(measured)),
    }

    def seconds(values: Mapping[str, float]) -> FloatArray:
        return _exchange_seconds(times, _filled(link, values))

    return _fitted(seconds, np.array(measured), start, ranges)


def _exchange_seconds(times: Sequence[ExchangeTime], link: Link) -> FloatArray:
    return exchange_seconds_of(
        np.array([KINDS[time.kind] for time in times]),
        np.array([float(time.nbytes) for time in times]),
        np.array([[time.group] for time in times]),
        Cluster(hosts=(_ANY,), links=(link,)),
    )


def _fitted(
    seconds: Callable[[Mapping[str, float]], FloatArray],
    measured: FloatArray,
    start: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
) -> dict[str, float]:
    """The values, inside their ranges, with the least relative errors; found on a logarithmic scale."""
    names = list(start)
    low, high = (np.log([ranges[name][side] for name in names]) for side in (0, 1))
    begin = np.clip(np.log([start[name] for name in names]), low + 1e-9, high - 1e-9)

    def errors(values: FloatArray) -> FloatArray:
        return np.asarray(np.log(seconds(_named(names, values)) / measured), dtype=np.float64)

    found = least_squares(errors, begin, bounds=(low, high), loss="soft_l1", f_scale=0.2)
    return _named(names, found.x)


def _named(names: Sequence[str], logarithms: FloatArray) -> dict[str, float]:
    return dict(zip(names, np.exp(logarithms).tolist(), strict=True))


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
    return float(_exchange_seconds([time], unit)[0])


def _residuals(times: MachineTimes, device: Device, link: Link) -> tuple[Residual, ...]:
    """Of kernels alone: what a program adds to each is left out again."""
    bare = _kernels(times)
    own = _filled(Efficiency(), _of_kernels(bare, [time.median_s for time in bare], device))
    priced = kernel_seconds(KernelTable.of([time.kernel for time in bare]), dataclasses.replace(device, efficiency=own))
    rows = [(_kind_of(time), float(seconds), time.median_s) for time, seconds in zip(bare, priced, strict=True)]
    rows += [(f"block {time.what.partition(' ')[0]}", _block_s(time, device), time.median_s) for time in times.blocks]
    chosen = [time for time in times.exchanges if time.chosen]
    rows += [
        (f"{time.kind} of {time.group}", float(seconds), time.median_s)
        for time, seconds in zip(chosen, _exchange_seconds(chosen, link) if chosen else (), strict=True)
    ]
    found = []
    for what in dict.fromkeys(row[0] for row in rows):
        errors = [abs(priced_s / measured_s - 1) for name, priced_s, measured_s in rows if name == what]
        found.append(Residual(what=what, count=len(errors), median=statistics.median(errors), largest=max(errors)))
    return tuple(found)


def _block_s(time: BlockTime, device: Device) -> float:
    counts = np.array([kernel.count for kernel in time.kernels])
    return float(counts @ kernel_seconds(KernelTable.of(time.kernels), device))


def _kind_of(time: KernelTime) -> str:
    return f"{time.kernel.kind} {time.kernel.dtype}" if time.kernel.kind is not KernelKind.MEMORY else "memory"


def _filled(value: Fields, numbers: Mapping[str, float]) -> Fields:
    """With those of the numbers that are its fields."""
    own = {field.name for field in dataclasses.fields(value)}
    given: dict[str, Any] = {name: number for name, number in numbers.items() if name in own}
    return dataclasses.replace(value, **given)


def _rounded(value: float) -> float:
    """What is fitted to noise has so many digits."""
    if value <= 0:
        return 0.0
    digits = _DIGITS - 1 - math.floor(math.log10(value))
    return round(value, digits)


_ANY = Hosts(device=Device(name="any", memory_bytes=1, flops_per_s={"float32": 1.0}, bytes_per_s=1.0), devices=1)
