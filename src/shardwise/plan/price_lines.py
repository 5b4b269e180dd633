"""A step line by line, of every place of its pipeline, and how much of what its devices are promised it uses.

Sums of seconds that are known. Refuses to know how a step is put together.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from shardwise.describe.cluster import Cluster, Overheads
from shardwise.layout import Layout
from shardwise.plan.compute import FloatArray
from shardwise.plan.lines import TimeLines
from shardwise.plan.stage_seconds import StageSeconds
from shardwise.plan.stage_work import StageWork
from shardwise.plan.steps import Steps, times_of

__all__ = ["time_lines", "utilisation_of"]


def time_lines(
    rows: StageSeconds,
    steps: Steps,
    ranks: tuple[tuple[int, ...], ...],
    num_micro_batches: int,
    overheads: Overheads,
) -> tuple[TimeLines, ...]:
    """Of every place of the pipeline; what is neither its own work nor a message on its way is the bubble."""
    found: list[TimeLines] = []
    nothing = np.zeros_like(rows.forward)
    whole = times_of(dataclasses.replace(rows, unshard_forward=nothing, unshard_backward=nothing), overheads)
    for own in ranks:
        chosen = list(own)

        def of(values: FloatArray, chosen: list[int] = chosen) -> float:
            return float(values[0, chosen].sum() * num_micro_batches)

        axes = {axis: of(pair[0]) + of(pair[1]) for axis, pair in rows.exchanges.items()}
        compute = of(rows.forward) + of(rows.input) + of(rows.weight)
        recompute = of(rows.recompute)
        busy = of(steps.times.forward) + of(steps.times.backward)
        gathered = max(0.0, busy - of(whole.forward) - of(whole.backward))  # of divided parameters, what shows
        host = max(0.0, busy - gathered - compute - recompute - sum(axes.values()))
        waits = max(0.0, float(steps.pipeline[0]) - busy)
        sent = min(waits, float((rows.send + rows.back)[0].sum()))
        found.append(
            TimeLines(
                compute=compute,
                recompute=recompute,
                pipeline=sent,
                bubble=waits - sent,
                replicas=float(steps.replicas[0]) + gathered,
                optimizer=float(steps.optimizer[0]),
                host=host + overheads.step_s,
                **axes,
            )
        )
    return tuple(found)


def utilisation_of(
    stages: Sequence[StageWork], layout: Layout, cluster: Cluster, num_micro_batches: int, step_s: float
) -> float:
    """Flops of a step of one replica's ranks over what their devices are promised in its time, by dtype."""
    alike = Counter(id(work.kernels) for work in stages)
    distinct = {id(work.kernels): work for work in stages}
    promised = {
        dtype: sum(hosts.device.rate(dtype) * hosts.num_devices for hosts in cluster.hosts) / cluster.num_devices
        for dtype in {kernel.dtype for work in distinct.values() for kernel in work.kernels}
    }
    seconds = sum(
        alike[own] * kernel.flops * kernel.count / promised[kernel.dtype]
        for own, work in distinct.items()
        for kernel in work.kernels
    )
    return seconds * num_micro_batches / (layout.pp * step_s) if step_s else 0.0
