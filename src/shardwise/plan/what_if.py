"""What if there were fewer or more devices: the best layout of each number of them, and how that scales.

    strong    the same batch on every number of devices
    weak      as many samples a device on every number of them

Knows searches; refuses to know models. `parse_sweep` reads "devices=8..1024".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError, ShardwiseError
from shardwise.plan.coarse import Works
from shardwise.plan.job import Job
from shardwise.plan.ranked import Objective, Ranked
from shardwise.plan.resize import of_devices
from shardwise.plan.search import search_layouts
from shardwise.plan.space import Limits
from shardwise.quantities import format_bytes, format_seconds

__all__ = ["Point", "Scaling", "parse_sweep", "scaling_table", "sweep"]

_MOST = 300  # prices of one point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The best layout of so many devices, or why there is none."""

    devices: int
    global_batch: int
    best: Ranked | None
    why_not: str = ""

    @property
    def samples_per_s(self) -> float:
        return self.global_batch / self.best.price.step_s if self.best is not None else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Points in the order of their devices. kind: "strong" or "weak"."""

    kind: str
    points: tuple[Point, ...]

    def efficiency(self, point: Point) -> float:
        """Samples a second and device, over those of the first point that has a layout; 0 where there is none."""
        first = next((each for each in self.points if each.best is not None), None)
        if first is None or point.best is None:
            return 0.0
        return (point.samples_per_s / point.devices) / (first.samples_per_s / first.devices)


def parse_sweep(text: str) -> tuple[int, ...]:
    """`"devices=8..1024"` -> 8, 16 … 1024; `"devices=8,24,96"` -> these. Raises `ConfigError`."""
    name, equals, values = text.replace(" ", "").partition("=")
    first, dots, last = values.partition("..")
    try:
        numbers = [int(first), int(last)] if dots else [int(number) for number in values.split(",")]
    except ValueError:
        numbers = []
    if name != "devices" or not equals or not numbers or min(numbers) < 1 or numbers != sorted(set(numbers)):
        raise ConfigError(
            f'a sweep is over devices, from few to many, but got "{text}"; write devices=8..1024 or devices=8,16,24'
        )
    if not dots:
        return tuple(numbers)
    found = [numbers[0]]
    while found[-1] * 2 <= numbers[1]:
        found.append(found[-1] * 2)
    return tuple(found if found[-1] == numbers[1] else [*found, numbers[1]])


def sweep(
    works: Works,
    cluster: Cluster,
    job: Job,
    *,
    limits: Limits,
    devices: Sequence[int],
    objective: Objective | str = Objective.TIME,
    most: int = _MOST,
) -> tuple[Scaling, Scaling]:
    """Strong and weak scaling over numbers of devices; the batch is that of `job` on the whole cluster."""
    strong, weak = [], []
    for count in devices:
        strong.append(_point(works, cluster, job, limits, count, job.global_batch, objective, most))
        own = max(1, round(job.global_batch * count / cluster.num_devices))
        weak.append(_point(works, cluster, job, limits, count, own, objective, most))
    return Scaling(kind="strong", points=tuple(strong)), Scaling(kind="weak", points=tuple(weak))


def scaling_table(scaling: Scaling) -> list[str]:
    """One line a point: devices, batch, seconds, samples a second, efficiency, MFU, memory, the layout."""
    first = "the same batch" if scaling.kind == "strong" else "as many samples a device"
    head = ["devices", "batch", "step", "samples/s", "efficiency", "MFU", "memory", "layout"]
    rows = [head]
    for point in scaling.points:
        if point.best is None:
            rows.append([str(point.devices), str(point.global_batch), "none", *[""] * 4, point.why_not])
            continue
        rows.append(
            [
                str(point.devices),
                str(point.global_batch),
                format_seconds(point.best.price.step_s),
                f"{point.samples_per_s:.4g}",
                f"{scaling.efficiency(point):.0%}",
                f"{point.best.price.mfu:.1%}",
                format_bytes(point.best.peak_bytes),
                str(point.best.layout),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = ["  ".join([*(c.rjust(w) for c, w in zip(row[:-1], widths, strict=True)), row[-1]]) for row in rows]
    return [f"{scaling.kind} scaling: {first} on every number of devices", *lines]


def _point(
    works: Works,
    cluster: Cluster,
    job: Job,
    limits: Limits,
    devices: int,
    global_batch: int,
    objective: Objective | str,
    most: int,
) -> Point:
    own = dataclasses.replace(job, global_batch=global_batch)
    try:
        found = search_layouts(
            works, of_devices(cluster, devices), own, limits=limits, objective=objective, top=1, most=most
        )
    except ShardwiseError as error:
        return Point(devices=devices, global_batch=global_batch, best=None, why_not=str(error))
    return Point(devices=devices, global_batch=global_batch, best=found[0].ranked)
