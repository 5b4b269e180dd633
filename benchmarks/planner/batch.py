"""Many cases of one source priced at once: their stages in one table, their pipelines in arrays of equal shape.

The arithmetic is the library's (`plan.stage_seconds`, `plan.steps.steps_of`); here rows are only gathered, so that a
fit that prices a thousand rows a thousand times takes minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.planner.cases import Case
from benchmarks.planner.devices import entry_of
from benchmarks.planner.fabrics import Fabric
from shardwise.describe.cluster import Cluster, Hosts, Overheads
from shardwise.errors import ConfigError
from shardwise.layout import Layout
from shardwise.plan.compute import FloatArray
from shardwise.plan.price import placed_stages
from shardwise.plan.stage_seconds import PlacedStage, StageSeconds, StageTable, stage_seconds
from shardwise.plan.steps import of_the_slowest, steps_of, with_sums

__all__ = ["Batch", "cluster_of"]

STEP_S = 3e-3  # of the host for one step: data, losses, the optimizer's start
SPREAD = 0.01  # of the speeds of a source's hosts
EXCHANGE_S = 3e-5  # of the host for one collective of torch.distributed: what both A100 tables want if it is fitted
_HOST = 8  # devices of a box: what the catalogue sells as more is a rack, which NVLink joins whatever boxes it has


def cluster_of(gpu: str, gpus_per_node: int | None = None, hosts: int = 2, *, fabric: Fabric | None = None) -> Cluster:
    """The catalogue's device and links of that name; hosts as large as the row says, or as the device is sold in.
    fabric: between hosts, where it is not what the catalogue has.

    Raises `ConfigError` where the catalogue has no such device."""
    entry = entry_of(gpu)
    if entry is None:
        raise ConfigError(f"{gpu!r} is no device of the catalogue; add it to devices.toml")
    joined = gpus_per_node or entry.devices_of_host
    if entry.devices_of_host > _HOST:
        joined = max(joined, entry.devices_of_host)
    inside = dataclasses.replace(entry.inside, ranks=joined)
    between = dataclasses.replace(entry.between, ranks=None)
    links = (inside, between if fabric is None else fabric.link(between))
    crowded_s = 0.0 if fabric is None else fabric.crowded_s
    overheads = Overheads(exchange_s=EXCHANGE_S, step_s=STEP_S, crowded_s=crowded_s, spread=SPREAD)
    return Cluster(
        hosts=(Hosts(device=entry.device, devices=joined, count=hosts),), links=links, overheads=overheads, name=gpu
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Alike:
    """Rows whose pipelines have one shape. index: (rows, stages) into the stages of the table."""

    layout: Layout
    overlap: bool
    rows: np.ndarray
    index: np.ndarray
    counts: FloatArray
    devices: FloatArray
    step_kernels: FloatArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Cases of one GPU and source, ready to be priced on any cluster of the same shape."""

    cases: tuple[Case, ...]
    table: StageTable
    alike: tuple[_Alike, ...]

    @classmethod
    def of(cls, cases: Sequence[Case], cluster: Cluster) -> Batch:
        places: dict[object, int] = {}
        placed: list[PlacedStage] = []
        found: dict[object, list[tuple[int, list[int], Case]]] = {}
        for row, case in enumerate(cases):
            indices = []
            for one in placed_stages(case.stages, case.layout, cluster, case.job):
                key = (
                    id(one.work.kernels),
                    id(one.work.exchanges),
                    one.send_levels,
                    one.spans,
                    one.layout.fsdp,
                    one.layout.zero,
                    one.job,
                    one.work.trained,
                    one.work.shared_parameters,
                    tuple(one.work.sends.values()),
                )
                if key not in places:
                    places[key] = len(placed)
                    placed.append(one)
                indices.append(places[key])
            shape = (case.layout.pp, case.layout.num_stages, case.layout.schedule, case.job.overlap_replicas)
            found.setdefault(shape, []).append((row, indices, case))
        alike = tuple(
            _Alike(
                layout=entries[0][2].layout,
                overlap=entries[0][2].job.overlap_replicas,
                rows=np.array([row for row, _, _ in entries]),
                index=np.array([indices for _, indices, _ in entries]),
                counts=np.array([float(case.num_micro_batches) for _, _, case in entries]),
                devices=np.array([float(case.layout.world_size) for _, _, case in entries]),
                step_kernels=np.array([float(case.job.step_kernels) for _, _, case in entries]),
            )
            for entries in found.values()
        )
        return cls(cases=tuple(cases), table=StageTable.of(placed), alike=alike)

    def step_s(self, cluster: Cluster) -> FloatArray:
        """[case]: seconds of its step."""
        seconds = stage_seconds(self.table, cluster)
        found = np.zeros(len(self.cases))
        for group in self.alike:
            steps = steps_of(
                with_sums(of_the_slowest(_gathered(seconds, group.index), group.devices, cluster), group.counts),
                group.counts,
                group.layout,
                cluster.overheads,
                overlap=group.overlap,
                step_kernels=group.step_kernels,
            )
            found[group.rows] = steps.step_s
        return found


def _gathered(seconds: StageSeconds, index: np.ndarray) -> StageSeconds:
    values = {
        field.name: getattr(seconds, field.name)[index]
        for field in dataclasses.fields(seconds)
        if field.name != "exchanges"
    }
    exchanges = {axis: (pair[0][index], pair[1][index]) for axis, pair in seconds.exchanges.items()}
    return StageSeconds(**values, exchanges=exchanges)
