"""Bytes that a rank keeps in its host's memory, and whether the host has them: what offload costs there.

    activations   of the micro-batches in flight, those that are not on the device
    optimizer     all that it remembers of what the rank updates

Arithmetic on stages; refuses to know seconds, and what of a device is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shardwise.describe.cluster import Cluster
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.memory import on_device
from shardwise.plan.stage_work import StageWork

__all__ = ["HostUse", "host_use"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostUse:
    """Of the fullest host: what its ranks keep there, and what it has; None: nobody knows."""

    needs_bytes: float
    memory_bytes: int | None

    @property
    def lacks_bytes(self) -> float:
        """More than there is; 0 where it fits or nobody knows."""
        return 0.0 if self.memory_bytes is None else max(0.0, self.needs_bytes - self.memory_bytes)


def host_use(
    ranks: Sequence[Sequence[int]],
    stages: Sequence[StageWork],
    layout: Layout,
    cluster: Cluster,
    job: Job,
    in_flight: Sequence[float],
) -> HostUse:
    """ranks[r]: the stages of place r of the pipeline; in_flight[s]: micro-batches that stage s keeps at most. A host
    is as full as if all of its ranks kept what the one that keeps most does."""
    fullest = 0.0
    for own in ranks:
        works, alive = [stages[stage] for stage in own], [in_flight[stage] for stage in own]
        needs = 0.0
        if layout.offloads_optimizer:
            needs += job.per_parameter.optimizer * sum(work.trained for work in works) / layout.fsdp
        for work, there, here in zip(works, alive, on_device(layout, works, alive), strict=True):
            needs += (there - here) * work.saved_bytes
        fullest = max(fullest, needs)
    hosts = cluster.hosts[0]
    memory = None if hosts.memory is None else hosts.memory.memory_bytes
    return HostUse(needs_bytes=fullest * min(hosts.devices, layout.world_size), memory_bytes=memory)
