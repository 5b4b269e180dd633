"""The price of a layout: seconds of a step and bytes of its ranks, from what the stages do and what the cluster is.

    StageWork ──StageTable──► StageSeconds ──pipeline──► step ◄── replicas, optimizer, host
              ──memory_lines──► bytes of every place of the pipeline

The same for a traced model and for a row of a table. `steps_of` prices many rows of one shape at once. A step:

    pipeline of all micro-batches  +  sums of gradients that show  +  optimizer  +  parameters gathered  +  host

where a micro-batch on a stage takes what the device or the host takes, whichever is longer (the host starts kernels
ahead of the device, and a device that is faster waits for it). Refuses to know modules and how a layout is applied.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from shardwise.describe.cluster import Cluster, Overheads
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.alike_pipelines import alive_of
from shardwise.plan.compute import FloatArray
from shardwise.plan.in_flight import kept_micro_batches
from shardwise.plan.job import Job
from shardwise.plan.lines import MemoryLines, TimeLines
from shardwise.plan.memory import memory_lines
from shardwise.plan.pipeline_time import PipelineTimes, costs_of_row, generated, pipeline_seconds
from shardwise.plan.placing import ORDER, send_level, spans_of
from shardwise.plan.sources import source_of
from shardwise.plan.stage_seconds import PlacedStage, StageSeconds, StageTable, stage_seconds
from shardwise.plan.stage_work import StageWork
from shardwise.schedule import GENERATORS, Timeline, placement, simulate

MOST_SIMULATED = 4096  # forwards of a step, which is simulated whole if it has no more

__all__ = ["Price", "Steps", "placed_stages", "price", "steps_of"]

WAITS = 4.0  # norm of device and host: where both take one second, a phase takes 2 ** (1 / 4) = 1.19


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """What a step takes and holds. time, memory: of each place of the pipeline; `fits`: whether the memory of each of
    its devices does; mfu: flops of the model, recomputation left out, over what the devices are promised."""

    step_s: float
    time: tuple[TimeLines, ...]
    memory: tuple[MemoryLines, ...]
    fits: bool
    mfu: float
    bubble_fraction: float
    timeline: Timeline | None = None

    @property
    def peak_bytes(self) -> float:
        """Of the fullest place."""
        return max(lines.total for lines in self.memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """Seconds of many rows: a step and its parts, shape (rows,); of stages, shape (rows, stages)."""

    step_s: FloatArray
    pipeline: FloatArray
    replicas: FloatArray
    optimizer: FloatArray
    times: PipelineTimes


def price(
    stages: Sequence[StageWork],
    layout: Layout,
    cluster: Cluster,
    job: Job,
    *,
    num_micro_batches: int,
    exact: bool = False,
    order: Sequence[str] = ORDER,
    seconds: StageSeconds | None = None,
    outline: bool = False,
) -> Price:
    """The price of one step of `num_micro_batches` a replica. exact: by the simulator, with its timeline; of a step of
    very many actions only as many micro-batches as fill the pipeline twice, and without a timeline.

    order: the axes of the layout, innermost first, as ranks are placed on the cluster (see `plan.placing`).
    seconds: of the stages, where they are known already (see `plan.known_seconds`). outline: of places of the pipeline
        whose stages are alike, only that which keeps most has its memory and time made out.
    Raises `LayoutError` where the stages are not those of the layout.
    """
    if len(stages) != layout.num_stages:
        raise LayoutError(f"{layout} has {layout.num_stages} stages, but got the work of {len(stages)}; cut it so")
    if seconds is None:
        seconds = stage_seconds(StageTable.of(placed_stages(stages, layout, cluster, job, order=order)), cluster)
    rows = _as_row(seconds)
    counts = np.array([float(num_micro_batches)])
    ranks = _ranks(layout)
    timeline = schedule = None
    steps = steps_of(rows, counts, layout, cluster.overheads, overlap=job.overlap_replicas)
    if exact or layout.schedule not in GENERATORS:
        source = source_of(layout)
        if source is None:
            raise LayoutError(f"schedule={layout.schedule} is found for a model; search, and name what was found")
        few = _few(layout, num_micro_batches)
        if layout.schedule in GENERATORS:
            schedule = generated(layout.schedule, layout.pp, few, layout.num_stages // layout.pp)
        else:
            schedule = source(few)
        timeline = simulate(schedule, costs=costs_of_row(steps.times, 0))
        seconds_of_few = timeline.seconds
        if few < num_micro_batches:
            chunks = layout.num_stages // layout.pp
            fewer = pipeline_seconds(steps.times, np.array([float(few)]), schedule=layout.schedule, chunks=chunks)
            seconds_of_few += float(steps.pipeline[0] - fewer[0])
            timeline = None
        steps = _with_pipeline(steps, seconds_of_few)
    alive = (
        in_flight_of(stages, layout, num_micro_batches) if schedule is None else kept_micro_batches(schedule, stages)
    )
    places = _outlined(stages, ranks, alive) if outline else range(len(ranks))
    memory = tuple(
        memory_lines(
            [stages[stage] for stage in ranks[place]],
            layout,
            job,
            num_micro_batches=num_micro_batches,
            in_flight=[alive[stage] for stage in ranks[place]],
            overheads=cluster.overheads,
        )
        for place in places
    )
    shown = tuple(ranks[place] for place in places)
    time = _time_lines(rows, steps, shown, num_micro_batches, cluster.overheads)
    step_s = float(steps.step_s[0])
    return Price(
        step_s=step_s,
        time=time,
        memory=memory,
        fits=all(
            lines.total <= cluster.device_of(min(_first_rank(layout, place), cluster.num_devices - 1)).memory_bytes
            for place, lines in zip(places, memory, strict=True)
        ),
        mfu=_mfu(stages, layout, cluster, num_micro_batches, step_s),
        bubble_fraction=float(np.mean([lines.bubble + lines.pipeline for lines in time]) / step_s) if step_s else 0.0,
        timeline=timeline,
    )


def placed_stages(
    stages: Sequence[StageWork], layout: Layout, cluster: Cluster, job: Job, *, order: Sequence[str] = ORDER
) -> list[PlacedStage]:
    """Every stage where its groups stand."""
    spans = spans_of(layout, cluster, order=order)
    owner = {stage: place for place, own in enumerate(_ranks(layout)) for stage in own}
    return [
        PlacedStage(
            work=work,
            layout=layout,
            job=job,
            spans=spans,
            send_levels=tuple(
                _level(layout, cluster, owner[work.stage], owner[target], tuple(order)) for target in work.sends
            ),
        )
        for work in stages
    ]


def steps_of(
    seconds: StageSeconds,
    num_micro_batches: FloatArray,
    layout: Layout,
    overheads: Overheads,
    *,
    overlap: bool,
) -> Steps:
    """Steps of many rows with the stages, schedule and chunks of `layout`. Arrays of `seconds`: (rows, stages)."""
    times, crowded = times_of(seconds, overheads), times_of(seconds, overheads, crowded=True)
    chunks = layout.num_stages // layout.pp
    pipeline = pipeline_seconds(times, num_micro_batches, schedule=_formula(layout), chunks=chunks)
    # Messages crowd what computes once forwards and backwards pass each other, not the first and the last.
    paces = [times.by_rank(one.forward + one.backward, _ranks(layout)).max(axis=1) for one in (crowded, times)]
    pipeline = pipeline + (num_micro_batches - 1) * (paces[0] - paces[1])
    hidden = np.minimum(seconds.reduce, times.backward) * (overheads.overlap if overlap else 0.0)
    # The last backward of a stage ends before the pipeline does, by the backwards of the stages before it.
    early = np.cumsum(times.backward + times.back, axis=1) - (times.backward + times.back)
    shown = np.maximum((seconds.reduce - hidden - early).max(axis=1), 0.0) + seconds.shared.max(axis=1)
    per_rank = [times.by_rank(part, _ranks(layout)).max(axis=1) for part in (seconds.optimizer, seconds.gather)]
    optimizer, gather = per_rank
    return Steps(
        step_s=pipeline + shown + optimizer + gather + overheads.step_s,
        pipeline=pipeline,
        replicas=shown + gather,
        optimizer=optimizer,
        times=times,
    )


def _formula(layout: Layout) -> str:
    """The generator whose closed form is taken; a schedule that is only given is simulated in its place."""
    if layout.schedule in GENERATORS:
        return layout.schedule
    return "gpipe" if layout.num_stages == layout.pp else "looped-bfs"


def times_of(seconds: StageSeconds, overheads: Overheads, *, crowded: bool = False) -> PipelineTimes:
    """Of every stage a forward and a backward of one micro-batch; crowded: while messages of others cross hosts."""
    shows = 1.0 - overheads.overlap
    slower = 1.0 + overheads.beside
    waits_forward = sum((pair[0] for pair in seconds.exchanges.values()), np.zeros_like(seconds.forward))
    waits_backward = sum((pair[1] for pair in seconds.exchanges.values()), np.zeros_like(seconds.forward))
    backward = seconds.recompute + seconds.input + seconds.weight
    forward_s = _beside(
        seconds.forward + waits_forward, seconds.hidden_forward + seconds.unshard_forward, shows, slower
    )
    backward_s = _beside(backward + waits_backward, seconds.hidden_backward + seconds.unshard_backward, shows, slower)
    host_forward, host_backward = seconds.host_forward, seconds.host_backward
    if crowded:
        host_forward, host_backward = host_forward + seconds.crowded_forward, host_backward + seconds.crowded_backward
    return PipelineTimes(
        forward=_longer(forward_s, host_forward) + overheads.action_s,
        backward=_longer(backward_s, host_backward) + overheads.action_s,
        weight=seconds.weight,
        send=seconds.send,
        back=seconds.back,
    )


def in_flight_of(stages: Sequence[StageWork], layout: Layout, num_micro_batches: int) -> tuple[float, ...]:
    """[s]: micro-batches that stage s keeps when its rank keeps the most, as if stages were equal."""
    chunks = layout.num_stages // layout.pp
    if layout.schedule not in GENERATORS:
        source = source_of(layout)
        return kept_micro_batches(source(num_micro_batches), stages) if source else (num_micro_batches,) * len(stages)
    if layout.schedule in ("1f1b", "pipedream-2bw") and chunks == 1:
        return tuple(float(min(num_micro_batches, layout.pp - stage)) for stage in range(layout.pp))
    if layout.schedule in ("gpipe", "looped-bfs"):
        return (float(num_micro_batches),) * len(stages)
    saved = sum(stage.saved_bytes for stage in stages)
    waiting = sum(stage.weight_bytes for stage in stages) / saved if saved else 0.0
    return alive_of(
        layout.schedule,
        num_ranks=layout.pp,
        chunks=chunks,
        num_micro_batches=num_micro_batches,
        waiting=min(1.0, waiting),
    )


def _beside(computing: FloatArray, messages: FloatArray, shows: float, slower: float) -> FloatArray:
    """Messages beside computing: what is longer, with the share that does not hide, and what they take of its pace."""
    both = np.minimum(computing, messages)
    return np.asarray(np.maximum(computing, messages) + both * (shows + slower - 1.0))


def _longer(device: FloatArray, host: FloatArray) -> FloatArray:
    """The longer of the two, and somewhat more where they are alike: each waits for the other now and then."""
    return np.asarray((device**WAITS + host**WAITS) ** (1.0 / WAITS))


def _as_row(seconds: StageSeconds) -> StageSeconds:
    """The arrays of one layout's stages as a single row."""
    values = {
        field.name: getattr(seconds, field.name)[None, :]
        for field in dataclasses.fields(seconds)
        if field.name != "exchanges"
    }
    exchanges = {axis: (pair[0][None, :], pair[1][None, :]) for axis, pair in seconds.exchanges.items()}
    return StageSeconds(**values, exchanges=exchanges)


def _ranks(layout: Layout) -> tuple[tuple[int, ...], ...]:
    if layout.schedule in GENERATORS:
        return placement(layout.schedule, num_ranks=layout.pp, chunks=layout.num_stages // layout.pp)
    source = source_of(layout)
    return source.ranks if source is not None else tuple((stage,) for stage in range(layout.num_stages))


def _level(layout: Layout, cluster: Cluster, place: int, target: int, order: tuple[str, ...]) -> int:
    return 0 if place == target else send_level(layout, cluster, place, target, order=order)


def _first_rank(layout: Layout, place: int) -> int:
    return place * (layout.world_size // layout.pp)


def _with_pipeline(steps: Steps, seconds: float) -> Steps:
    more = seconds - steps.pipeline
    return dataclasses.replace(steps, step_s=steps.step_s + more, pipeline=steps.pipeline + more)


def _few(layout: Layout, num_micro_batches: int) -> int:
    """Micro-batches that are simulated."""
    if layout.schedule not in GENERATORS or num_micro_batches * layout.num_stages <= MOST_SIMULATED:
        return num_micro_batches
    return min(num_micro_batches, 2 * layout.pp + num_micro_batches % layout.pp)


def _outlined(
    stages: Sequence[StageWork], ranks: tuple[tuple[int, ...], ...], alive: Sequence[float]
) -> tuple[int, ...]:
    """Of places whose stages are alike, the one that keeps most."""
    fullest: dict[tuple[tuple[int, int, float], ...], tuple[float, int]] = {}
    for place, own in enumerate(ranks):
        works = [stages[stage] for stage in own]
        alike = tuple((id(work.kernels), work.parameters, work.saved_bytes) for work in works)
        kept = sum(alive[stage] * stages[stage].saved_bytes for stage in own)
        if alike not in fullest or kept > fullest[alike][0]:
            fullest[alike] = (kept, place)
    return tuple(sorted(place for _, place in fullest.values()))


def _time_lines(
    rows: StageSeconds,
    steps: Steps,
    ranks: tuple[tuple[int, ...], ...],
    num_micro_batches: int,
    overheads: Overheads,
) -> tuple[TimeLines, ...]:
    """Of every place of the pipeline; what is neither its own work nor a message on its way is the bubble."""
    found: list[TimeLines] = []
    for own in ranks:
        chosen = list(own)

        def of(values: FloatArray, chosen: list[int] = chosen) -> float:
            return float(values[0, chosen].sum() * num_micro_batches)

        axes = {axis: of(pair[0]) + of(pair[1]) for axis, pair in rows.exchanges.items()}
        compute = of(rows.forward) + of(rows.input) + of(rows.weight)
        recompute = of(rows.recompute)
        busy = of(steps.times.forward) + of(steps.times.backward)
        host = max(0.0, busy - compute - recompute - sum(axes.values()))
        waits = max(0.0, float(steps.pipeline[0]) - busy)
        sent = min(waits, float((rows.send + rows.back)[0].sum()))
        found.append(
            TimeLines(
                compute=compute,
                recompute=recompute,
                pipeline=sent,
                bubble=waits - sent,
                replicas=float(steps.replicas[0]),
                optimizer=float(steps.optimizer[0]),
                host=host + overheads.step_s,
                **axes,
            )
        )
    return tuple(found)


def _mfu(stages: Sequence[StageWork], layout: Layout, cluster: Cluster, num_micro_batches: int, step_s: float) -> float:
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
