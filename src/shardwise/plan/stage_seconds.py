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
from scipy.sparse import csr_matrix

from shardwise.describe.cluster import Cluster
from shardwise.describe.kernels import ExchangeKind, Kernel, Phase
from shardwise.layout import Layout
from shardwise.plan.collectives import KINDS, exchange_seconds_of
from shardwise.plan.compute import FloatArray, KernelTable, kernel_seconds
from shardwise.plan.job import Job
from shardwise.plan.placing import Span, Spans
from shardwise.plan.stage_work import StageWork

__all__ = ["PlacedStage", "StageSeconds", "StageTable", "stage_seconds"]

PARTS = ("forward", "input", "weight", "recompute")  # of a micro-batch, by what computes
AXES = ("tp", "cp", "ep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedStage:
    """A stage, where its groups stand, and the level of the link to the stages that it sends to."""

    work: StageWork
    layout: Layout
    job: Job
    spans: Spans
    send_levels: tuple[int, ...] = ()  # in the order of work.sends

    def shown(self) -> tuple[tuple[ExchangeKind, float, Span], ...]:
        """Exchanges of a step behind the last backward: gradients summed, parameters gathered."""
        return tuple(entry for entry in (*_reduces(self), *_gathers(self)) if entry[2].num_ranks > 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """Seconds of every stage, arrays of shape (stages,). Of a micro-batch: forward to hidden_backward, send, return,
    unshard; of a step: reduce, gather, optimizer. exchanges[axis]: (forward, backward) that computing waits for."""

    forward: FloatArray
    input: FloatArray
    weight: FloatArray
    recompute: FloatArray
    exchanges: dict[str, tuple[FloatArray, FloatArray]]
    hidden_forward: FloatArray
    hidden_backward: FloatArray
    host_forward: FloatArray
    host_backward: FloatArray
    crowded_forward: FloatArray
    crowded_backward: FloatArray
    send: FloatArray
    back: FloatArray
    unshard_forward: FloatArray
    unshard_backward: FloatArray
    reduce: FloatArray
    shared: FloatArray
    gather: FloatArray
    optimizer: FloatArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTable:
    """Stages as sums over one table of distinct kernels and one of distinct exchanges."""

    kernels: KernelTable
    parts: dict[str, csr_matrix]  # part -> (stages, kernels): how many of each
    exchanges: dict[str, _ExchangeSums]
    hosts: dict[str, FloatArray]  # kernels and exchanges that are started, and crowded hops, forward and backward
    optimizer_bytes: FloatArray
    size: int

    @classmethod
    def of(cls, placed: Sequence[PlacedStage]) -> StageTable:
        """The table of these stages; equal kernels of theirs are priced once."""
        index: dict[_Alike, int] = {}
        distinct: list[Kernel] = []
        entries: dict[str, list[tuple[int, int, int]]] = {part: [] for part in PARTS}
        hosts = {name: np.zeros(len(placed)) for name in _HOSTS}
        for stage, one in enumerate(placed):
            for part, kernel in _parts(one.work):
                place = _place(index, distinct, kernel)
                entries[part].append((stage, place, kernel.count))
                hosts[f"kernels_{_side(part)}"][stage] += kernel.count
            for exchange in one.work.exchanges:
                side = "forward" if exchange.phase is Phase.FORWARD else "backward"
                hosts[f"exchanges_{side}"][stage] += exchange.count
                if one.spans.pipeline_crosses:
                    hops = getattr(one.spans, exchange.axis).num_ranks
                    hosts[f"crowded_{side}"][stage] += exchange.count * hops
        return cls(
            kernels=KernelTable.of(distinct),
            parts={part: _matrix(rows, (len(placed), len(distinct))) for part, rows in entries.items()},
            exchanges=_exchange_sums(placed),
            hosts=hosts,
            optimizer_bytes=np.array([_optimizer_bytes(one) for one in placed]),
            size=len(placed),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExchangeSums:
    """Distinct exchanges, and how many of each a stage does."""

    kinds: npt.NDArray[np.int64]
    nbytes: FloatArray
    sizes: npt.NDArray[np.int64]
    of_stages: csr_matrix


_HOSTS = tuple(f"{what}_{side}" for what in ("kernels", "exchanges", "crowded") for side in ("forward", "backward"))


def stage_seconds(table: StageTable, cluster: Cluster) -> StageSeconds:
    """Seconds of every stage of the table on the first device of the cluster."""
    device, overheads = cluster.hosts[0].device, cluster.overheads
    each = kernel_seconds(table.kernels, device)
    parts = {part: np.asarray(matrix @ each) for part, matrix in table.parts.items()}
    sums = {name: _sum_seconds(sums, cluster) for name, sums in table.exchanges.items()}
    zero = np.zeros(table.size)
    hosts = {
        side: table.hosts[f"kernels_{side}"] * overheads.kernel_s
        + table.hosts[f"exchanges_{side}"] * overheads.exchange_s
        for side in ("forward", "backward")
    }
    rate = device.bytes_per_s * (device.efficiency.update or device.efficiency.memory)
    return StageSeconds(
        **parts,
        exchanges={
            axis: (sums.get(f"{axis}_forward", zero), sums.get(f"{axis}_backward", zero))
            for axis in AXES
            if f"{axis}_forward" in sums or f"{axis}_backward" in sums
        },
        hidden_forward=sums.get("hidden_forward", zero),
        hidden_backward=sums.get("hidden_backward", zero),
        host_forward=hosts["forward"],
        host_backward=hosts["backward"],
        crowded_forward=table.hosts["crowded_forward"] * overheads.crowded_s + sums.get("crowded_forward", zero),
        crowded_backward=table.hosts["crowded_backward"] * overheads.crowded_s + sums.get("crowded_backward", zero),
        send=sums.get("send", zero),
        back=sums.get("back", zero),
        unshard_forward=sums.get("unshard_forward", zero),
        unshard_backward=sums.get("unshard_backward", zero),
        reduce=sums.get("reduce", zero),
        shared=sums.get("shared", zero),
        gather=sums.get("gather", zero),
        optimizer=table.optimizer_bytes / rate,
    )


def _sum_seconds(sums: _ExchangeSums, cluster: Cluster) -> FloatArray:
    return np.asarray(sums.of_stages @ exchange_seconds_of(sums.kinds, sums.nbytes, sums.sizes, cluster))


def _parts(work: StageWork) -> list[tuple[str, Kernel]]:
    return [*((kernel.phase.value, kernel) for kernel in work.kernels), *(("recompute", k) for k in work.recomputed)]


def _side(part: str) -> str:
    return "forward" if part == "forward" else "backward"


_Alike = tuple[str, str, int, int, tuple[int, ...]]


def _place(index: dict[_Alike, int], distinct: list[Kernel], kernel: Kernel) -> int:
    """Where a kernel stands among the distinct ones: its count and phase are not its price."""
    alike = (kernel.kind.value, kernel.dtype, kernel.flops, kernel.nbytes, kernel.shape)
    if alike not in index:
        index[alike] = len(distinct)
        distinct.append(kernel)
    return index[alike]


def _matrix(entries: list[tuple[int, int, int]], shape: tuple[int, int]) -> csr_matrix:
    rows, columns, counts = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_matrix((np.array(counts, dtype=np.float64), (rows, columns)), shape=shape)


_Entry = tuple[ExchangeKind, float, Span, int]  # kind, bytes, span, count


def _exchange_sums(placed: Sequence[PlacedStage]) -> dict[str, _ExchangeSums]:
    found: dict[str, list[tuple[int, _Entry]]] = {}
    for stage, one in enumerate(placed):
        for name, entry in _exchanges(one):
            found.setdefault(name, []).append((stage, entry))
    return {name: _sums(rows, len(placed)) for name, rows in found.items()}


def _exchanges(one: PlacedStage) -> list[tuple[str, _Entry]]:
    """All that a stage exchanges, by what it is added up as."""
    spans = {"tp": one.spans.tp, "cp": one.spans.cp, "ep": one.spans.ep}
    entries: list[tuple[str, _Entry]] = []
    for exchange in one.work.exchanges:
        side = "forward" if exchange.phase is Phase.FORWARD else "backward"
        name = f"hidden_{side}" if exchange.hidden else f"{exchange.axis}_{side}"
        entries.append((name, (exchange.kind, exchange.nbytes, spans[exchange.axis], exchange.count)))
        if one.spans.pipeline_crosses:  # the hops alone
            entries.append((f"crowded_{side}", (exchange.kind, 0.0, spans[exchange.axis], exchange.count)))
    sides = (("send", one.work.sends), ("back", one.work.gradients))
    for name, sent in sides:
        for level, nbytes in zip(one.send_levels, sent.values(), strict=False):
            entries.append((name, (ExchangeKind.SEND, nbytes, _over(level), 1)))
    for name, kind, nbytes, span in (
        *(("reduce", *entry) for entry in _reduces(one)),
        *(("gather", *entry) for entry in _gathers(one)),
        *_unshards(one),
        *_shared(one),
    ):
        if span.num_ranks > 1 and nbytes:
            entries.append((name, (kind, nbytes, span, 1)))
    return entries


def _over(level: int) -> Span:
    """Two ranks that a link of this level joins."""
    return Span(sizes=tuple(2 if at == level else 1 for at in range(max(level + 1, 2))))


def _reduces(one: PlacedStage) -> list[tuple[ExchangeKind, float, Span]]:
    """Gradients behind a step: scattered among those that divide the state, then summed among those that do not."""
    work, layout, size = one.work, one.layout, one.job.reduce_bytes
    own = float((work.trained - work.expert_trained) * size)
    found: list[tuple[ExchangeKind, float, Span]] = []
    if layout.fsdp > 1:
        if layout.zero < 2 or layout.unshards_by_step:
            found.append((ExchangeKind.REDUCE_SCATTER, own, one.spans.states))
        found.append((ExchangeKind.ALL_REDUCE, own / layout.fsdp, one.spans.outer))
    else:
        found.append((ExchangeKind.ALL_REDUCE, own, one.spans.replicas))
    found.append((ExchangeKind.ALL_REDUCE, float(work.expert_trained * size), one.spans.expert_copies))
    return found


def _gathers(one: PlacedStage) -> list[tuple[ExchangeKind, float, Span]]:
    """Parameters that each rank has updated a part of."""
    layout = one.layout
    if layout.fsdp == 1 or (layout.zero == 3 and not layout.unshards_by_step):
        return []
    return [(ExchangeKind.ALL_GATHER, float(one.work.parameters * one.job.per_parameter.parameter), one.spans.states)]


def _unshards(one: PlacedStage) -> list[tuple[str, ExchangeKind, float, Span]]:
    """At zero=3 by micro-batch: parameters for the forward, again for the backward, and gradients divided behind it; at
    zero=2 the gradients alone (as `divide_states.sent_bytes` counts them)."""
    layout = one.layout
    if layout.fsdp == 1 or layout.zero < 2 or layout.unshards_by_step:
        return []
    units = one.work.unit_parameters or (one.work.parameters,)
    entries: list[tuple[str, ExchangeKind, float, Span]] = []
    for unit in units:
        gathered = float(unit * one.job.per_parameter.parameter) if layout.zero == 3 else 0.0
        entries.append(("unshard_forward", ExchangeKind.ALL_GATHER, gathered, one.spans.states))
        entries.append(("unshard_backward", ExchangeKind.ALL_GATHER, gathered, one.spans.states))
        reduced = float(unit * one.job.reduce_bytes)
        entries.append(("unshard_backward", ExchangeKind.REDUCE_SCATTER, reduced, one.spans.states))
    return entries


def _shared(one: PlacedStage) -> list[tuple[str, ExchangeKind, float, Span]]:
    """Gradients of what two stages hold, over the link between the ends of the pipeline."""
    if not one.work.shared_parameters:
        return []
    nbytes = float(one.work.shared_parameters * one.job.reduce_bytes)
    return [("shared", ExchangeKind.ALL_REDUCE, nbytes, _over(1 if one.spans.pipeline_crosses else 0))]


def _sums(rows: list[tuple[int, _Entry]], size: int) -> _ExchangeSums:
    index: dict[tuple[ExchangeKind, float, Span], int] = {}
    entries: list[tuple[int, int, int]] = []
    for stage, (kind, nbytes, span, count) in rows:
        place = index.setdefault((kind, nbytes, span), len(index))
        entries.append((stage, place, count))
    levels = max(len(span.sizes) for _, _, span in index)
    return _ExchangeSums(
        kinds=np.array([KINDS[kind] for kind, _, _ in index], dtype=np.int64),
        nbytes=np.array([nbytes for _, nbytes, _ in index], dtype=np.float64),
        sizes=np.array([(*span.sizes, *(1,) * (levels - len(span.sizes))) for _, _, span in index], dtype=np.int64),
        of_stages=_matrix(entries, (size, len(index))),
    )


def _optimizer_bytes(one: PlacedStage) -> float:
    """A pass over what a rank updates (reads gradient, master and states, writes the last two and the parameter), and
    one over all its gradients (their norm, and zeros for the next step)."""
    per = one.job.per_parameter
    divided = one.layout.fsdp if one.layout.fsdp > 1 else 1
    updated = one.work.trained / divided
    return updated * (per.gradient + 2 * (per.master + per.optimizer) + 2 * per.parameter) + (
        2 * one.work.trained * per.gradient
    )
