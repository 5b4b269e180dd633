"""A measured machine as people read it: tables of what was measured, what was fitted, how well it fits. Pure text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from shardwise.describe.cluster import Cluster
from shardwise.describe.kernels import KernelKind
from shardwise.describe.measured import ExchangeTime, KernelTime, MachineTimes, spread_of
from shardwise.plan.fit_cluster import Coefficient, FittedCluster
from shardwise.quantities import format_bytes, format_duration, format_rate, format_seconds

__all__ = ["report"]

_UNITS: dict[str, Callable[[float], str]] = {  # the first that fits
    "_per_s": format_rate,
    "_s": format_seconds,
    "_bytes": format_bytes,
}


def report(measured: Sequence[MachineTimes], fitted: Sequence[FittedCluster], passed_s: float) -> str:
    """All numbers of ranks, one after another."""
    first = measured[0]
    lines = [f"{first.device}, {first.cores} of them; measured in {format_duration(passed_s)}, {_rounds(first)} rounds"]
    for times, fit in zip(measured, fitted, strict=True):
        lines += ["", *_of(times, fit)]
    return "\n".join(lines)


def _rounds(times: MachineTimes) -> int:
    return len(times.kernels[0].seconds)


def _of(times: MachineTimes, fit: FittedCluster) -> Iterator[str]:
    crowd = "" if times.ranks <= times.cores else f" on {times.cores} cores"
    yield f"=== {times.ranks} ranks at once{crowd}"
    yield f"{'kernel':44}{'one rank':>13}{'each':>13}  slower  spread"
    yield from _kernels(times)
    for block in times.blocks:
        seconds, spread = format_seconds(block.median_s), spread_of(block.seconds)
        yield f"{'block, ' + block.what:44}{'':13}{seconds:>13}{'':8}{spread:8.1%}"
    for way in times.divided:
        seconds, spread = format_seconds(way.median_s), spread_of(way.seconds)
        yield f"{'micro-batch of a model, ' + way.what:57}{seconds:>13}{'':8}{spread:8.1%}"
    if times.exchanges:
        yield ""
        yield f"{'exchange':44}{'seconds':>13}{'bytes':>13}{'':9}spread"
        yield from (_exchange(time) for time in times.exchanges)
    yield ""
    yield from _program(times)
    yield ""
    yield f"{'fitted':28}{'value':>16}   from round to round"
    yield from (_coefficient(each, fit.cluster) for each in fit.coefficients)
    yield ""
    yield f"{'formula beside measurement':34}{'count':>6}{'median':>9}{'largest':>9}"
    yield from (f"{r.what:34}{r.count:6}{r.median:9.1%}{r.largest:9.1%}" for r in fit.residuals)


def _kernels(times: MachineTimes) -> Iterator[str]:
    for alone, time in zip(times.alone, times.kernels, strict=True):
        slower = time.median_s / alone.median_s
        yield f"{_name(time):44}{_rate(alone):>13}{_rate(time):>13}{slower:7.2f}x{spread_of(time.seconds):8.1%}"


def _name(time: KernelTime) -> str:
    kernel = time.kernel
    if kernel.kind is KernelKind.MEMORY:
        return f"{time.what} {kernel.phase}, {format_bytes(kernel.nbytes)}"
    shape = "x".join(map(str, kernel.shape if kernel.shape[0] > 1 else kernel.shape[1:]))
    return f"{time.what or kernel.kind} {kernel.dtype} {shape} {kernel.phase}"


def _rate(time: KernelTime) -> str:
    if time.kernel.kind is not KernelKind.MEMORY:
        return format_rate(time.kernel.flops / time.median_s, "flops")
    if time.kernel.nbytes < 4096:  # nothing moves: what counts is how long it takes
        return format_seconds(time.median_s)
    return format_rate(time.kernel.nbytes / time.median_s)


def _exchange(time: ExchangeTime) -> str:
    used = "" if time.chosen else " (not used)"
    name = f"{time.kind} of {time.group}, {time.way}{used}"
    size, spread = format_bytes(time.nbytes), spread_of(time.seconds)
    return f"{name:44}{format_seconds(time.median_s):>13}{size:>13}{'':9}{spread:.1%}"


def _program(times: MachineTimes) -> Iterator[str]:
    program = times.program
    for name, of_rounds in (("an action of a program", program.action_s), ("a step besides", program.step_s)):
        middle = format_seconds(statistics.median(of_rounds))
        yield f"{name:44}{middle:>13}{'':22}{spread_of(of_rounds):.1%}"
    yield f"{'starting ranks':44}{format_seconds(program.start_s):>13}"
    yield f"{'laying out a model':44}{format_seconds(program.layout_s):>13}"
    yield f"{'a rank without a model':44}{format_bytes(program.framework_bytes):>13}"


def _coefficient(each: Coefficient, cluster: Cluster) -> str:
    device, link = cluster.hosts[0].device, cluster.links[0]
    of = {
        "matmul": ("of " + ", ".join(f"{format_rate(r, 'flops')} {d}" for d, r in device.flops_per_s.items())),
        "attention": "of the same",
        "update": "of the same",
        "memory": f"of {format_rate(device.bytes_per_s)}",
        "efficiency": f"of {format_rate(link.bytes_per_s)}, {link.name}",
    }
    low, value, high = (_number(each.name, n) for n in (each.least, each.value, each.most))
    return f"{each.name:28}{value:>16}   {low} to {high}{'   ' if each.name in of else ''}{of.get(each.name, '')}"


def _number(name: str, value: float) -> str:
    for ending, written in _UNITS.items():
        if name.endswith(ending):
            return written(value)
    return f"{value:.3g}" if value < 1e3 else f"{value:.3e}"
