"""The same machine with fewer or more devices, and what it costs. Knows clusters; refuses to know layouts."""

from __future__ import annotations

import dataclasses

from shardwise.describe.cluster import Cluster, Hosts
from shardwise.errors import ConfigError

__all__ = ["halves", "of_devices", "usd_per_second"]


def of_devices(cluster: Cluster, devices: int) -> Cluster:
    """The first `devices` of a cluster; where it has fewer, more hosts of its last kind.

    Raises `ConfigError` where that many devices are no whole hosts, unless they are a part of one.
    """
    if devices == cluster.num_devices:
        return cluster
    left, chosen = devices, []
    for hosts in cluster.hosts:
        own = min(left, hosts.num_devices)
        chosen += _hosts(hosts, own)
        left -= own
        if not left:
            return dataclasses.replace(cluster, hosts=tuple(chosen))
    more = _hosts(cluster.hosts[-1], cluster.hosts[-1].num_devices + left)
    return dataclasses.replace(cluster, hosts=(*cluster.hosts[:-1], *more))


def halves(cluster: Cluster) -> tuple[int, ...]:
    """All devices, half of them, and so on, as far as these are whole hosts or a part of one."""
    found = [cluster.num_devices]
    while found[-1] % 2 == 0:
        half = found[-1] // 2
        try:
            of_devices(cluster, half)
        except ConfigError:
            break
        found.append(half)
    return tuple(found)


def usd_per_second(cluster: Cluster) -> float | None:
    """Of all its devices; None where one has no price."""
    prices = [(hosts.device.usd_per_hour, hosts.num_devices) for hosts in cluster.hosts]
    total = 0.0
    for price, count in prices:
        if price is None:
            return None
        total += price * count / 3600
    return total


def _hosts(hosts: Hosts, devices: int) -> list[Hosts]:
    count, rest = divmod(devices, hosts.devices)
    if rest and count:
        raise ConfigError(
            f"a layout fills whole hosts, or a part of one, but {devices} devices are {count} hosts of {hosts.devices} "
            f"and {rest} devices; use {count * hosts.devices} or {(count + 1) * hosts.devices}"
        )
    if rest:
        return [dataclasses.replace(hosts, devices=rest, count=1)]
    return [dataclasses.replace(hosts, count=count)] if count else []
