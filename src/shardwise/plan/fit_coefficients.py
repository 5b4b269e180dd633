"""Coefficients by least relative errors: those of kernels alone, of whole blocks, of exchanges.

Fitted are the formulas of `compute` and `collectives` themselves, robustly (soft L1), so that what a formula does not
know shows as a residual. Every coefficient stays in a range in which it is physical. Knows formulas; refuses to know
which measurements there are, and what machine they are from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import least_squares, nnls

from shardwise.describe.cluster import Cluster, Device, Efficiency, Hosts, Link, Overheads
from shardwise.describe.kernels import Kernel, KernelKind, Phase
from shardwise.describe.measured import BlockTime, DividedTime, ExchangeTime, KernelTime
from shardwise.plan.collectives import KINDS, exchange_seconds_of
from shardwise.plan.compute import FloatArray, KernelTable, kernel_seconds
from shardwise.plan.stage_exchanges import waits_in

__all__ = [
    "delayed",
    "divided_s",
    "exchange_times_s",
    "filled",
    "kernels_s",
    "of_blocks",
    "of_divided",
    "of_kernels",
    "of_link",
]

Fields = TypeVar("Fields", Efficiency, Link, Overheads)

_LEAST_SHARE = 0.005
_STRAYS = {"matmul": 3.0, "attention": 5.0, "memory": 10.0}  # so much less than an error of a block counts


def of_kernels(times: Sequence[KernelTime], measured: Sequence[float], promised: Device) -> dict[str, float]:
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
    if promised.processors == 1:
        start["pack_bytes_per_s"] = promised.bytes_per_s
    ranges = {
        "matmul": (_LEAST_SHARE, 1.0),
        "attention": (_LEAST_SHARE, 1.0),
        "memory": (_LEAST_SHARE, 1.0),
        "pack_bytes_per_s": (promised.bytes_per_s / 10, promised.bytes_per_s * 1e3),
        "launch_s": (least / 100, least * 1.5),
        "matmul_half_flops": (1.0, 1e4 * start["matmul_half_flops"]),
        "memory_half_bytes": (1.0, 1e4 * start["memory_half_bytes"]),
    }

    def seconds(values: Mapping[str, float]) -> FloatArray:
        return kernel_seconds(table, dataclasses.replace(promised, efficiency=filled(Efficiency(), values)))

    return _fitted(seconds, np.array(measured), start, ranges)


def of_blocks(
    times: Sequence[BlockTime], measured: Sequence[float], promised: Device, alone: Mapping[str, float]
) -> dict[str, float]:
    """Rates and the delay of every kernel with which the kernels of a block take as long as the block; near what they
    reach `alone`. Kernels of a forward are delayed by the program that asks for them, too."""
    tables = [KernelTable.of(time.kernels) for time in times]
    counts = [np.array([kernel.count for kernel in time.kernels]) for time in times]
    asked = np.array([sum(k.count for k in time.kernels if k.phase is Phase.FORWARD) for time in times])
    start = {"matmul": alone["matmul"], "attention": alone["attention"], "memory": alone["memory"]}
    start |= {"delay_s": 1e-5, "asked_s": 1e-5}
    ranges = {"matmul": (_LEAST_SHARE, 1.0), "attention": (_LEAST_SHARE, 1.0), "memory": (_LEAST_SHARE, 1.0)}
    ranges |= {"delay_s": (1e-7, 1e-3), "asked_s": (1e-8, 1e-3)}

    def whole(values: Mapping[str, float]) -> dict[str, float]:
        return {**alone, **values, **delayed(promised, values, values["delay_s"])}

    def seconds(values: Mapping[str, float]) -> FloatArray:
        device = dataclasses.replace(promised, efficiency=filled(Efficiency(), whole(values)))
        wholes = [n @ kernel_seconds(table, device) for table, n in zip(tables, counts, strict=True)]
        near = [(values[name] / alone[name]) ** (1 / _STRAYS[name]) for name in _STRAYS]
        return np.array([*(np.array(wholes) + values["asked_s"] * asked), *near])

    weights = np.array([*(time.weight for time in times), *(1.0 for _ in _STRAYS)])
    found = _fitted(seconds, np.array([*measured, *(1.0 for _ in _STRAYS)]), start, ranges, weights)
    return {name: value for name, value in whole(found).items() if name != "delay_s"}


def delayed(promised: Device, shares: Mapping[str, float], delay_s: float) -> dict[str, float]:
    """What is added to every kernel, as the flops or bytes that take as long."""
    return {
        "matmul_half_flops": delay_s * promised.rate("float32") * shares["matmul"],
        "memory_half_bytes": delay_s * promised.bytes_per_s * shares["memory"],
    }


def of_link(times: Sequence[ExchangeTime], measured: Sequence[float], link: Link) -> dict[str, float]:
    least = min(measured)
    start = {"efficiency": 0.5, "latency_s": least / 4, "half_bytes": 1024.0, "meeting_s": least / 4}
    ranges = {
        "efficiency": (_LEAST_SHARE, 1.0),
        "latency_s": (1e-9, max(measured)),
        "half_bytes": (1.0, 1e8),
        "meeting_s": (1e-9, max(measured)),
    }

    def seconds(values: Mapping[str, float]) -> FloatArray:
        return exchange_times_s(times, filled(link, values))

    return _fitted(seconds, np.array(measured), start, ranges)


def of_divided(times: Sequence[DividedTime], measured: Sequence[float], device: Device, link: Link) -> dict[str, float]:
    """What a micro-batch takes longer, divided in one way or another, than its kernels and exchanges: of every function
    of tokens that are dealt out, every other rank of a collective, every message. None is below 0 (least squares of
    relative errors: Lawson and Hanson 1974). The first time is of the undivided model, and says how fast the machine
    was meanwhile."""
    alone = np.array([divided_s(time, device, link, Overheads()) for time in times])
    speed = measured[0] / alone[0]
    left = (np.array(measured) - speed * alone) / np.array(measured)
    things = np.array([_added(time) for time in times], dtype=np.float64) / np.array(measured)[:, None]
    found, _ = nnls(things[1:], left[1:])
    return dict(zip(("dealt_s", "interrupted_s", "message_s"), found.tolist(), strict=True))


def divided_s(time: DividedTime, device: Device, link: Link, overheads: Overheads) -> float:
    """As it is priced."""
    found = kernels_s(time.kernels, device)
    if time.exchanges:
        each = exchange_seconds_of(
            np.array([KINDS[exchange.kind] for exchange in time.exchanges]),
            np.array([float(exchange.nbytes) for exchange in time.exchanges]),
            np.array([[time.group]] * len(time.exchanges)),
            Cluster(hosts=(_ANY,), links=(link,)),
        )
        found += float(np.array([exchange.count for exchange in time.exchanges]) @ each)
    _, others, messages = _added(time)
    return found + others * overheads.interrupted_s + messages * overheads.message_s


def kernels_s(kernels: Sequence[Kernel], device: Device) -> float:
    """Of all of them, those of a forward delayed by the program that asks for them."""
    counts = np.array([kernel.count for kernel in kernels])
    asked = sum(k.count for k in kernels if k.phase is Phase.FORWARD and k.kind is not KernelKind.FUNCTION)
    return float(counts @ kernel_seconds(KernelTable.of(kernels), device)) + asked * device.efficiency.asked_s


def _added(time: DividedTime) -> tuple[int, int, int]:
    """Functions, other ranks, messages."""
    waits = [waits_in(exchange, time.group) for exchange in time.exchanges]
    functions = sum(kernel.count for kernel in time.kernels if kernel.kind is KernelKind.FUNCTION)
    return functions, sum(each.others for each in waits), sum(each.messages for each in waits)


def exchange_times_s(times: Sequence[ExchangeTime], link: Link) -> FloatArray:
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
    weights: FloatArray | None = None,
) -> dict[str, float]:
    """The values, inside their ranges, with the least relative errors; found on a logarithmic scale. An error that is
    four times as heavy is as four errors."""
    heavy = np.sqrt(np.ones(len(measured)) if weights is None else weights)
    names = list(start)
    low, high = (np.log([ranges[name][side] for name in names]) for side in (0, 1))
    begin = np.clip(np.log([start[name] for name in names]), low + 1e-9, high - 1e-9)

    def errors(values: FloatArray) -> FloatArray:
        return np.asarray(heavy * np.log(seconds(_named(names, values)) / measured), dtype=np.float64)

    found = least_squares(errors, begin, bounds=(low, high), loss="soft_l1", f_scale=0.2)
    return _named(names, found.x)


def _named(names: Sequence[str], logarithms: FloatArray) -> dict[str, float]:
    return dict(zip(names, np.exp(logarithms).tolist(), strict=True))


def filled(value: Fields, numbers: Mapping[str, float]) -> Fields:
    """With those of the numbers that are its fields."""
    own = {field.name for field in dataclasses.fields(value)}
    given: dict[str, Any] = {name: number for name, number in numbers.items() if name in own}
    return dataclasses.replace(value, **given)


_ANY = Hosts(device=Device(name="any", memory_bytes=1, flops_per_s={"float32": 1.0}, bytes_per_s=1.0), devices=1)
