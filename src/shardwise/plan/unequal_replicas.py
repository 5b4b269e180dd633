"""Replicas on devices of several kinds: how many micro-batches each one would take, and what a step takes then.

    even     every replica m micro-batches      the step waits for the slowest device
    shares   by speed, m of them on average     all replicas are done at about the same time

For layouts without a pipeline, whose replicas stand whole on one kind of device. Refuses to know how batches are
divided.
"""

from __future__ import annotations

import dataclasses

from shardwise.describe.cluster import Hosts
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.lines import TimeLines
from shardwise.plan.pricer import Pricer
from shardwise.plan.resize import of_devices
from shardwise.plan.uneven import micro_batch_shares

__all__ = ["Shares", "shares_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """kinds: (device, its replicas, micro-batches of each of them, at most); step_s, even_s: seconds of a step with
    these shares, and with equal ones. layout: that trains so; None where replicas meet in every micro-batch."""

    kinds: tuple[tuple[str, int, int], ...]
    step_s: float
    even_s: float
    layout: Layout | None

    def __str__(self) -> str:
        told = ", ".join(f"{count} micro-batches on {device}" for device, _, count in self.kinds)
        return f"{told}: {self.step_s / self.even_s:.2f} of the seconds of equal shares"


def shares_of(pricer: Pricer, layout: Layout) -> Shares:
    """Shares by speed, or those that the layout has. Raises `LayoutError` unless the layout has several replicas, no
    pipeline, and each of them stands on devices of one kind."""
    cluster = of_devices(pricer.cluster, layout.world_size)
    each = layout.cp * layout.tp
    if layout.pp > 1 or layout.num_replicas == 1 or any(hosts.num_devices % each for hosts in cluster.hosts):
        raise LayoutError(
            f"shares are of replicas that stand whole on one kind of device, without a pipeline, but {layout} has "
            f"{layout.num_replicas} replicas of {layout.pp} × {each} ranks; use pp=1, and tp × cp that divides the "
            "devices of every kind"
        )
    count = layout.num_micro_batches(pricer.job.global_batch)
    equal = dataclasses.replace(layout, shares=None)
    even = pricer(equal)
    busy = [_busy_s(pricer, equal, hosts) / count for hosts in cluster.hosts]
    of_replica = [index for index, hosts in enumerate(cluster.hosts) for _ in range(hosts.num_devices // each)]
    shares = layout.shares or micro_batch_shares([busy[index] for index in of_replica], count * layout.num_replicas)
    slowest = max(own * busy[index] for index, own in zip(of_replica, shares, strict=True))
    waited = max(_computing(lines) for lines in even.price.time)
    kinds = tuple(
        (
            hosts.device.name,
            of_replica.count(index),
            max(own for at, own in zip(of_replica, shares, strict=True) if at == index),
        )
        for index, hosts in enumerate(cluster.hosts)
    )
    step_s = even.price.step_s
    return Shares(
        kinds=kinds,
        step_s=step_s - waited + slowest,
        even_s=step_s,
        layout=dataclasses.replace(layout, micro_batches=count, shares=shares)
        if layout.fsdp == layout.ep == 1
        else None,
    )


def _busy_s(pricer: Pricer, layout: Layout, hosts: Hosts) -> float:
    """Of one replica on hosts of one kind, for as many micro-batches as equal shares are."""
    count, rest = divmod(layout.world_size, hosts.devices)
    sizes = ((hosts.devices, count), (rest, 1))
    alike = tuple(dataclasses.replace(hosts, devices=n, count=times) for n, times in sizes if n and times)
    alone = dataclasses.replace(pricer.cluster, hosts=alike)
    priced = Pricer(pricer.works, alone, pricer.job, pricer.limits)(layout)
    return max(_computing(lines) for lines in priced.price.time)


def _computing(lines: TimeLines) -> float:
    return lines.compute + lines.recompute + lines.tp + lines.cp + lines.ep + lines.host
