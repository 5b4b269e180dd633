"""Seconds of stages: kernels, exchanges, starts by the host, sums of replicas and the optimizer, for many at once.

    StageTable.of(placed)       what any number of stages, of one layout or of thousands of rows, are made of, as arrays
    stage_seconds(table, cl)    the seconds of each on a cluster: as fast for a thousand stages as for ten

Refuses to know the order in which stages run, and how a step is made of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shardwise.describe.cluster import Cluster
from shardwise.describe.kernels import ExchangeKind, Kernel, KernelKind
from shardwise.layout import Layout
from shardwise.plan.collectives import KINDS, exchange_seconds_of
from shardwise.plan.compute import KINDS_OF_KERNELS, FloatArray, KernelTable, kernel_seconds
from shardwise.plan.job import Job
from shardwise.plan.placing import Span
from shardwise.plan.stage_exchanges import SIDES, Entry, PlacedStage, exchanges_of, phase_of, side_of, waits_of
from shardwise.plan.stage_work import StageWork

__all__ = ["PlacedStage", "StageSeconds", "StageTable", "offloaded_bytes", "stage_seconds", "visit_bytes"]

PARTS = ("forward", "input", "weight", "recompute", "accumulation")  # of a micro-batch, by what computes
AXES = ("tp", "cp", "ep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """Seconds of every stage, arrays of shape (stages,). Of a micro-batch: forward to hidden_backward, send, return,
    unshard, offload (of what is kept to the host, and as long back); of a step: reduce, gather, optimizer.
    exchanges[axis]: (forward, backward) that computing waits for; `again`: of the latter, what recomputed forwards wait
    for. host_again: of the host, for these. accumulation: of every micro-batch but the first, not in `weight` yet."""

    forward: FloatArray
    input: FloatArray
    weight: FloatArray
    recompute: FloatArray
    accumulation: FloatArray
    exchanges: dict[str, tuple[FloatArray, FloatArray]]
    hidden_forward: FloatArray
    hidden_backward: FloatArray
    again: FloatArray
    host_forward: FloatArray
    host_again: FloatArray
    host_backward: FloatArray
    send: FloatArray
    back: FloatArray
    unshard_forward: FloatArray
    unshard_backward: FloatArray
    offload: FloatArray
    reduce: FloatArray
    shared: FloatArray
    gather: FloatArray
    optimizer: FloatArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Counts:
    """How many of each thing the stages have: stage, thing and number of every entry. A sparse matrix in little, since
    most tables are of a few stages, and making one takes longer than all that is asked of it."""

    stages: npt.NDArray[np.int64]
    things: npt.NDArray[np.int64]
    numbers: FloatArray
    size: int

    @classmethod
    def of(cls, entries: Sequence[tuple[int, int, float]], size: int) -> _Counts:
        stages, things, numbers = zip(*entries, strict=True) if entries else ((), (), ())
        return cls(
            stages=np.array(stages, dtype=np.int64),
            things=np.array(things, dtype=np.int64),
            numbers=np.array(numbers, dtype=np.float64),
            size=size,
        )

    def times(self, each: FloatArray) -> FloatArray:
        """Of every stage: the sum of what each thing is, as often as it is there."""
        return np.asarray(
            np.bincount(self.stages, weights=self.numbers * each[self.things], minlength=self.size), dtype=np.float64
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTable:
    """Stages as sums over one table of distinct kernels and one of distinct exchanges."""

    kernels: KernelTable
    parts: dict[str, _Counts]  # part -> how many of each kernel the stages have
    exchanges: dict[str, _ExchangeSums]
    waits: dict[str, FloatArray]  # by what exchanges are added up as: (stages, 2), `Waits`
    hosts: dict[str, FloatArray]  # by phase: kernels and exchanges that are started, and hops that are crowded
    optimizer_bytes: FloatArray
    offloaded_bytes: FloatArray  # of a micro-batch, that wait in the host's memory
    visiting: FloatArray  # elements that the host updates
    visit_bytes: tuple[int, int]  # of one of these: over the link each way, over the host's memory
    size: int

    @classmethod
    def of(cls, placed: Sequence[PlacedStage]) -> StageTable:
        """The table of these stages; equal kernels of theirs are priced once."""
        index: dict[_Alike, int] = {}
        distinct: list[Kernel] = []
        entries: dict[str, list[tuple[int, int, int]]] = {part: [] for part in PARTS}
        hosts = {name: np.zeros(len(placed)) for name in _HOSTS}
        waits: dict[str, FloatArray] = {}
        for stage, one in enumerate(placed):
            for part, kernel in _parts(one.work):
                place = _place(index, distinct, kernel)
                entries[part].append((stage, place, kernel.count))
                hosts[f"kernels_{side_of(part)}"][stage] += kernel.count
            for name, numbers in waits_of(one):
                waits.setdefault(name, np.zeros((len(placed), 2)))[stage] += numbers
            for exchange in one.work.exchanges:
                side = phase_of(exchange)
                hosts[f"exchanges_{side}"][stage] += exchange.count
                if one.spans.pipeline_crosses:
                    hops = getattr(one.spans, exchange.axis).num_ranks
                    hosts[f"crowded_{side}"][stage] += exchange.count * hops
        return cls(
            kernels=KernelTable.of(distinct),
            parts={part: _Counts.of(rows, len(placed)) for part, rows in entries.items()},
            exchanges=_exchange_sums(placed),
            waits=waits,
            hosts=hosts,
            optimizer_bytes=np.array([_optimizer_bytes(one) for one in placed]),
            offloaded_bytes=np.array([offloaded_bytes(one.work, one.layout) for one in placed]),
            visiting=np.array([_updated(one) if one.layout.offloads_optimizer else 0.0 for one in placed]),
            visit_bytes=visit_bytes(placed[0].job) if placed else (0, 0),
            size=len(placed),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExchangeSums:
    """Distinct exchanges, and how many of each a stage does."""

    kinds: npt.NDArray[np.int64]
    nbytes: FloatArray
    sizes: npt.NDArray[np.int64]
    of_stages: _Counts


_HOSTS = tuple(f"{what}_{side}" for what in ("kernels", "exchanges", "crowded") for side in SIDES)


def stage_seconds(table: StageTable, cluster: Cluster) -> StageSeconds:
    """Seconds of every stage of the table on the first device of the cluster."""
    device, overheads = cluster.hosts[0].device, cluster.overheads
    each = kernel_seconds(table.kernels, device)
    parts = {part: counts.times(each) for part, counts in table.parts.items()}
    if device.efficiency.asked_s:
        asked = np.where(table.kernels.kind == KINDS_OF_KERNELS[KernelKind.FUNCTION], 0.0, device.efficiency.asked_s)
        for part in ("forward", "recompute"):
            parts[part] = parts[part] + table.parts[part].times(asked)
    sums = {name: _sum_seconds(sums, cluster) for name, sums in table.exchanges.items()}
    for name, waits in table.waits.items():
        sums[name] = sums[name] + waits @ np.array([overheads.interrupted_s, overheads.message_s])
    zero = np.zeros(table.size)
    hosts = {
        side: table.hosts[f"kernels_{side}"] * overheads.kernel_s
        + table.hosts[f"exchanges_{side}"] * overheads.exchange_s
        + table.hosts[f"crowded_{side}"] * overheads.crowded_s
        + sums.get(f"crowded_{side}", zero)
        for side in SIDES
    }
    rate = device.bytes_per_s * (device.efficiency.update or device.efficiency.memory)
    offload, optimizer = zero, table.optimizer_bytes / rate
    if (store := cluster.hosts[0].memory) is not None:
        offload = table.offloaded_bytes * store.copy_s(1.0)
        copied, passed = table.visit_bytes
        optimizer = optimizer + table.visiting * max(store.copy_s(copied), store.pass_s(passed))
    return StageSeconds(
        **parts,
        exchanges={
            axis: (sums.get(f"{axis}_forward", zero), sums.get(f"{axis}_backward", zero))
            for axis in AXES
            if f"{axis}_forward" in sums or f"{axis}_backward" in sums
        },
        hidden_forward=sums.get("hidden_forward", zero),
        hidden_backward=sums.get("hidden_backward", zero),
        again=sums.get("again", zero),
        **{f"host_{side}": seconds for side, seconds in hosts.items()},
        send=sums.get("send", zero),
        back=sums.get("back", zero),
        unshard_forward=sums.get("unshard_forward", zero),
        unshard_backward=sums.get("unshard_backward", zero),
        offload=offload,
        reduce=sums.get("reduce", zero),
        shared=sums.get("shared", zero),
        gather=sums.get("gather", zero),
        optimizer=optimizer,
    )


def _sum_seconds(sums: _ExchangeSums, cluster: Cluster) -> FloatArray:
    return sums.of_stages.times(exchange_seconds_of(sums.kinds, sums.nbytes, sums.sizes, cluster))


def _parts(work: StageWork) -> list[tuple[str, Kernel]]:
    parts = [(kernel.phase.value, kernel) for kernel in work.kernels]
    parts += [("recompute", kernel) for kernel in work.recomputed]
    return [*parts, *(("accumulation", kernel) for kernel in work.accumulation)]


_Alike = tuple[str, str, int, int, tuple[int, ...]]


def _place(index: dict[_Alike, int], distinct: list[Kernel], kernel: Kernel) -> int:
    """Where a kernel stands among the distinct ones: its count and phase are not its price."""
    alike = (kernel.kind.value, kernel.dtype, kernel.flops, kernel.nbytes, kernel.shape)
    if alike not in index:
        index[alike] = len(distinct)
        distinct.append(kernel)
    return index[alike]


def _exchange_sums(placed: Sequence[PlacedStage]) -> dict[str, _ExchangeSums]:
    found: dict[str, list[tuple[int, Entry]]] = {}
    for stage, one in enumerate(placed):
        for name, entry in exchanges_of(one):
            found.setdefault(name, []).append((stage, entry))
    return {name: _sums(rows, len(placed)) for name, rows in found.items()}


def _sums(rows: list[tuple[int, Entry]], size: int) -> _ExchangeSums:
    index: dict[tuple[ExchangeKind, float, Span], int] = {}
    entries: list[tuple[int, int, float]] = []
    for stage, (kind, nbytes, span, count) in rows:
        place = index.setdefault((kind, nbytes, span), len(index))
        entries.append((stage, place, count))
    levels = max(len(span.sizes) for _, _, span in index)
    return _ExchangeSums(
        kinds=np.array([KINDS[kind] for kind, _, _ in index], dtype=np.int64),
        nbytes=np.array([nbytes for _, nbytes, _ in index], dtype=np.float64),
        sizes=np.array([(*span.sizes, *(1,) * (levels - len(span.sizes))) for _, _, span in index], dtype=np.int64),
        of_stages=_Counts.of(entries, size),
    )


def _updated(one: PlacedStage) -> float:
    """Elements that a rank updates."""
    return one.work.trained / (one.layout.fsdp if one.layout.fsdp > 1 else 1)


def _optimizer_bytes(one: PlacedStage) -> float:
    """A pass over what a rank updates (reads gradient, master and states, writes the last two and the parameter), but
    where the host does it, and one over all its gradients (their norm, and zeros for the next step)."""
    per = one.job.per_parameter
    norms = 2 * one.work.trained * per.gradient
    values = per.parameter * (1 if per.master else 2)  # with masters they are written alone
    if one.layout.offloads_optimizer:
        return float(norms)
    return _updated(one) * (per.gradient + 2 * (per.master + per.optimizer) + values) + norms


def visit_bytes(job: Job) -> tuple[int, int]:
    """Of an element that the host updates: over the link on the longer way (its value and gradient go, the value comes
    back, beside the update), and over the host's memory (the same, and the states, read and written)."""
    per = job.per_parameter
    value = per.master or per.parameter
    return value + per.gradient, 2 * (value + per.gradient + value) + 2 * per.optimizer


def offloaded_bytes(work: StageWork, layout: Layout) -> float:
    """Of a micro-batch, that wait in the host's memory. In a pipeline the last stage goes back at once, and keeps what
    it has."""
    last = work.stage == layout.num_stages - 1
    return work.saved_bytes if layout.offloads_activations and (layout.pp == 1 or not last) else 0.0
