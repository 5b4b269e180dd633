"""Prices of layouts on one cluster for one job; what stages do is asked for once for all layouts that share it.

Where devices are not equal, stages that a layout leaves to a rule are cut by speed and memory (`plan.uneven`) and
listed by unit. Refuses to know how layouts are chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shardwise.describe.cluster import Cluster, Device
from shardwise.layout import Layout, Offload, StageRule, compress
from shardwise.layout.rules import RECOMPUTE
from shardwise.plan.coarse import Works
from shardwise.plan.host_store import host_use
from shardwise.plan.job import Job
from shardwise.plan.known_seconds import KnownSeconds
from shardwise.plan.memory import states_of
from shardwise.plan.placing import ORDER
from shardwise.plan.price import in_flight_of, placed_stages, price
from shardwise.plan.ranked import Ranked, room_of
from shardwise.plan.resize import of_devices, usd_per_second
from shardwise.plan.space import Limits
from shardwise.plan.stage_seconds import StageSeconds, StageTable, stage_seconds
from shardwise.plan.stage_work import StageWork
from shardwise.plan.steps import ranks_of
from shardwise.plan.uneven import Kind, uneven_stages
from shardwise.schedule import GENERATORS, placement

__all__ = ["Pricer", "devices_of_places", "uneven_layout"]


class Pricer:
    """Layout -> `Ranked`. A resource: it keeps stages and clusters."""

    def __init__(self, works: Works, cluster: Cluster, job: Job, limits: Limits) -> None:
        self.works, self.cluster, self.job, self.limits = works, cluster, job, limits
        self._stages: dict[tuple[object, ...], tuple[StageWork, ...]] = {}
        self._clusters: dict[int, tuple[Cluster, float | None]] = {}
        self._known: dict[int, KnownSeconds] = {}

    def __call__(
        self,
        layout: Layout,
        samples: int | None = None,
        *,
        exact: bool = False,
        outline: bool = False,
        order: Sequence[str] = ORDER,
    ) -> Ranked:
        """The price of a layout, `samples` a micro-batch; None: as many as its batch makes. exact, outline, order: as
        `price` has them (nothing is outlined where devices are of several kinds). Raises what stages and prices
        raise."""
        cluster, rate = self._cluster(layout.world_size)
        count = layout.num_micro_batches(self.job.global_batch)
        each = samples or max(1, self.job.global_batch // (layout.num_replicas * count))
        if cluster.is_uniform:
            count = layout.most_micro_batches(self.job.global_batch)
        else:  # shares are by speed there (see `plan.unequal_replicas`)
            layout = uneven_layout(layout, each, self.works, cluster, self.job, self.limits)
        stages = self.stages(layout, each)
        made = price(
            stages,
            layout,
            cluster,
            self.job,
            num_micro_batches=count,
            exact=exact,
            order=order,
            seconds=self._seconds(stages, layout, cluster) if _is_known(layout, order) else None,
            outline=outline and cluster.is_uniform,
        )
        memory = _memory_of_places(layout, cluster, len(made.memory))
        return Ranked(
            layout=layout,
            price=made,
            devices=layout.world_size,
            usd=None if rate is None else rate * made.step_s,
            room_bytes=room_of(made, memory),
            host_lacks_bytes=self._host_lacks_bytes(stages, layout, cluster, count),
            exact=exact,
        )

    def stages(self, layout: Layout, samples: int) -> tuple[StageWork, ...]:
        """What every stage does; made once for all layouts that differ in replicas alone."""
        key = (
            *(layout.tp, layout.cp, layout.ep, layout.pp, layout.num_stages, samples, layout.recompute),
            *(layout.sequence_parallel, layout.stages, layout.schedule if layout.pp > 1 else ""),
            layout.context,
            *([] if layout.recompute in RECOMPUTE else [layout.micro_batches]),  # a budget is for those in flight
        )
        if key not in self._stages:
            alone = dataclasses.replace(layout, offload=Offload.NONE)  # what waits elsewhere is computed all the same
            self._stages[key] = tuple(self.works(alone, samples))
        return self._stages[key]

    def usd_rate(self, devices: int) -> float | None:
        """Dollars a second of the first so many devices."""
        return self._cluster(devices)[1]

    def memory_of(self, devices: int) -> int:
        """Bytes of the largest device among the first so many."""
        return max(hosts.device.memory_bytes for hosts in self._cluster(devices)[0].hosts)

    def _host_lacks_bytes(
        self, stages: tuple[StageWork, ...], layout: Layout, cluster: Cluster, num_micro_batches: int
    ) -> float:
        if layout.offload is Offload.NONE:
            return 0.0
        alive = in_flight_of(stages, layout, num_micro_batches)
        return host_use(ranks_of(layout), stages, layout, cluster, self.job, alive).lacks_bytes

    def _seconds(self, stages: tuple[StageWork, ...], layout: Layout, cluster: Cluster) -> StageSeconds:
        known = self._known.setdefault(cluster.num_devices, KnownSeconds(cluster, self.job))
        ranks = placement(layout.schedule, num_ranks=layout.pp, chunks=layout.num_stages // layout.pp)
        owner = {stage: place for place, own in enumerate(ranks) for stage in own}
        if cluster.is_uniform:
            devices = [cluster.hosts[0].device] * layout.pp
        else:
            devices = [_slowest(own) for own in devices_of_places(layout, cluster)]
        return known(stages, layout, [owner[stage] for stage in range(len(stages))], devices)

    def _cluster(self, devices: int) -> tuple[Cluster, float | None]:
        if devices not in self._clusters:
            cluster = of_devices(self.cluster, devices)
            self._clusters[devices] = (cluster, usd_per_second(cluster))
        return self._clusters[devices]


def _is_known(layout: Layout, order: Sequence[str]) -> bool:
    return layout.schedule in GENERATORS and tuple(order) == ORDER


def devices_of_places(layout: Layout, cluster: Cluster) -> tuple[tuple[Device, ...], ...]:
    """[place of the pipeline]: the kinds of devices that its ranks stand on, in order."""
    each = layout.world_size // layout.pp
    found: list[tuple[Device, ...]] = []
    for place in range(layout.pp):
        first, own = 0, []
        for hosts in cluster.hosts:
            last = first + hosts.num_devices
            if first < (place + 1) * each and place * each < last:
                own.append(hosts.device)
            first = last
        found.append(tuple(own))
    return tuple(found)


def uneven_layout(layout: Layout, samples: int, works: Works, cluster: Cluster, job: Job, limits: Limits) -> Layout:
    """The layout with stages by the speed and memory of the devices that they stand on, where it leaves them to a rule,
    one a rank, and the model has names for its units."""
    devices = devices_of_places(layout, cluster)
    kinds = [_slowest(own) for own in devices]
    given = not isinstance(layout.stages, StageRule) or layout.num_stages != layout.pp
    if layout.pp == 1 or given or not limits.names or len({device.name for device in kinds}) == 1:
        return layout
    alone = dataclasses.replace(layout, dp=1, shares=None, fsdp=1, pp=len(limits.names), schedule="1f1b", chunks=None)
    units = [dataclasses.replace(unit, sends={}, gradients={}) for unit in works(alone, samples)]
    runs: list[tuple[Device, int]] = []
    for device in kinds:
        if runs and runs[-1][0] == device:
            runs[-1] = (device, runs[-1][1] + 1)
        else:
            runs.append((device, 1))
    own = [
        Kind(
            seconds=_unit_seconds(units, alone, cluster, device, job),
            places=count,
            memory_bytes=device.memory_bytes - cluster.overheads.framework_bytes,
        )
        for device, count in runs
    ]
    cut = uneven_stages(
        own,
        held_bytes=[states_of([unit], layout, job).total for unit in units],
        saved_bytes=[unit.saved_bytes for unit in units],
        num_micro_batches=layout.num_micro_batches(job.global_batch),
        in_order=True,
    )
    starts = (0, *cut.ends[:-1])
    listed = tuple(compress(limits.names[start:end]) for start, end in zip(starts, cut.ends, strict=True))
    return dataclasses.replace(layout, stages=listed)


def _unit_seconds(
    units: list[StageWork], layout: Layout, cluster: Cluster, device: Device, job: Job
) -> tuple[float, ...]:
    """Forward and backward of a micro-batch, of every unit on that device."""
    on = dataclasses.replace(cluster, hosts=(dataclasses.replace(cluster.hosts[0], device=device),))
    each = stage_seconds(StageTable.of(placed_stages(units, layout, cluster, job)), on)
    busy = each.forward + each.recompute + each.input + each.weight + each.accumulation
    for forward, backward in each.exchanges.values():
        busy = busy + forward + backward
    return tuple(float(seconds) for seconds in busy)


def _slowest(devices: tuple[Device, ...]) -> Device:
    return min(devices, key=lambda device: device.rate("bfloat16") * device.efficiency.matmul)


def _memory_of_places(layout: Layout, cluster: Cluster, places: int) -> tuple[int, ...]:
    """Of the smallest device of every place whose memory was made out."""
    if cluster.is_uniform:
        return (cluster.hosts[0].device.memory_bytes,) * places
    return tuple(min(device.memory_bytes for device in own) for own in devices_of_places(layout, cluster))
