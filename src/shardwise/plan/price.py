"""The price of a layout: seconds of a step and bytes of its ranks, from what the stages do and what the cluster is.

    StageWork ──StageTable──► StageSeconds ──pipeline──► step ◄── replicas, optimizer, host
              ──memory_lines──► bytes of every place of the pipeline

The same for a traced model and for a row of a table; how a step is summed up is in `plan.steps`. Refuses to know
modules and how a layout is applied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from shardwise.describe.cluster import Cluster
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.alike_pipelines import alive_of
from shardwise.plan.in_flight import kept_micro_batches
from shardwise.plan.job import Job
from shardwise.plan.lines import MemoryLines, TimeLines
from shardwise.plan.memory import memory_lines
from shardwise.plan.pipeline_time import costs_of_row, generated, pipeline_seconds
from shardwise.plan.placing import ORDER, send_level, spans_of
from shardwise.plan.price_lines import time_lines, utilisation_of
from shardwise.plan.room import has_room
from shardwise.plan.shared_cores import at_least_s, shared_seconds
from shardwise.plan.sources import source_of
from shardwise.plan.stage_seconds import PlacedStage, StageSeconds, StageTable, stage_seconds
from shardwise.plan.stage_work import StageWork
from shardwise.plan.steps import Steps, of_the_slowest, ranks_of, steps_of, with_sums
from shardwise.schedule import GENERATORS, Timeline, simulate

MOST_SIMULATED = 4096  # forwards of a step, which is simulated whole if it has no more

__all__ = ["Price", "in_flight_of", "placed_stages", "price"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """What a step takes and holds. time, memory: of each place of the pipeline; room: the share of its device's memory
    that the fullest place leaves free, below 0 where it lacks some; mfu: flops of the model, recomputation left out,
    over what the devices are promised."""

    step_s: float
    time: tuple[TimeLines, ...]
    memory: tuple[MemoryLines, ...]
    room: float
    mfu: float
    bubble_fraction: float
    timeline: Timeline | None = None

    @property
    def fits(self) -> bool:
        """Whether every place fits into the memory of its device."""
        return self.room >= 0

    @property
    def has_room(self) -> bool:
        """Whether it leaves as much free as one that is chosen has to (see `plan.room`)."""
        return has_room(self.room)

    @property
    def peak_bytes(self) -> float:
        """Of the fullest place."""
        return max(lines.total for lines in self.memory)


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
    rows = of_the_slowest(_as_row(seconds), np.array([float(layout.world_size)]), cluster)
    counts = np.array([float(num_micro_batches)])
    rows = with_sums(rows, counts)
    ranks = ranks_of(layout)
    timeline = schedule = None
    crowd = max(hosts.crowd for hosts in cluster.hosts)
    steps = steps_of(
        rows, counts, layout, cluster.overheads, overlap=job.overlap_replicas, step_kernels=job.step_kernels
    )
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
        if crowd > 1 and layout.pp > 1:
            seconds_of_few = shared_seconds(schedule, costs_of_row(steps.times, 0), crowd=crowd)
        if few < num_micro_batches:
            chunks = layout.num_stages // layout.pp
            fewer = pipeline_seconds(steps.times, np.array([float(few)]), schedule=layout.schedule, chunks=chunks)
            seconds_of_few += float(steps.pipeline[0] - fewer[0])
            timeline = None
        steps = _with_pipeline(steps, seconds_of_few)
    elif crowd > 1 and layout.pp > 1:
        work = float((steps.times.forward + steps.times.backward).sum()) * num_micro_batches
        steps = _with_pipeline(steps, at_least_s(work / layout.pp, float(steps.pipeline[0]), crowd=crowd))
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
    time = time_lines(rows, steps, shown, num_micro_batches, cluster.overheads)
    step_s = float(steps.step_s[0])
    return Price(
        step_s=step_s,
        time=time,
        memory=memory,
        room=min(
            1.0 - lines.total / cluster.device_of(min(_first_rank(layout, place), cluster.num_devices - 1)).memory_bytes
            for place, lines in zip(places, memory, strict=True)
        ),
        mfu=utilisation_of(stages, layout, cluster, num_micro_batches, step_s),
        bubble_fraction=float(np.mean([lines.bubble + lines.pipeline for lines in time]) / step_s) if step_s else 0.0,
        timeline=timeline,
    )


def placed_stages(
    stages: Sequence[StageWork], layout: Layout, cluster: Cluster, job: Job, *, order: Sequence[str] = ORDER
) -> list[PlacedStage]:
    """Every stage where its groups stand."""
    spans = spans_of(layout, cluster, order=order)
    owner = {stage: place for place, own in enumerate(ranks_of(layout)) for stage in own}
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


def _as_row(seconds: StageSeconds) -> StageSeconds:
    """The arrays of one layout's stages as a single row."""
    values = {
        field.name: getattr(seconds, field.name)[None, :]
        for field in dataclasses.fields(seconds)
        if field.name != "exchanges"
    }
    exchanges = {axis: (pair[0][None, :], pair[1][None, :]) for axis, pair in seconds.exchanges.items()}
    return StageSeconds(**values, exchanges=exchanges)


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
