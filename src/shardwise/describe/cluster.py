"""The machine as a value: devices, how many, and the links between them by level.

    Cluster ─┬─ hosts    of one or several kinds: so many hosts of so many devices
             └─ links    lowest level first: inside a host, between hosts, between pods

Rates are what is promised (a datasheet's), `Efficiency` the share of them that is reached, fitted or measured: physical
numbers, so that an efficiency is at most 1 and a latency at least 0. Refuses to know models and layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shardwise.errors import ConfigError

__all__ = ["Cluster", "Device", "Efficiency", "Hosts", "Link", "Overheads"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Of a device's promised rates, what is reached.

    matmul, attention, memory: the share that large ones reach.
    launch_s: of one kernel, below which none ends.
    matmul_half_flops: a product of so many flops reaches half of `matmul` (small ones fill a device badly); 0: all do.
    memory_half_bytes: likewise of bytes moved.
    """

    matmul: float = 0.7
    attention: float = 0.5
    memory: float = 0.8
    launch_s: float = 5e-6
    matmul_half_flops: float = 0.0
    memory_half_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "memory"):
            _share(name, getattr(self, name))
        for name in ("launch_s", "matmul_half_flops", "memory_half_bytes"):
            _at_least(name, getattr(self, name), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device. `flops_per_s` maps a dtype to the dense rate of matrix products; a dtype that is missing computes as
    float32 does. `processors`: what a product's tiles are dealt out to (SMs, cores)."""

    name: str
    memory_bytes: int
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    processors: int = 1
    usd_per_hour: float | None = None
    efficiency: Efficiency = Efficiency()

    def __post_init__(self) -> None:
        if not self.flops_per_s:
            raise ConfigError(f"device {self.name} has a rate for at least one dtype, but got none; add flops_per_s")
        for dtype, rate in self.flops_per_s.items():
            _above(f"{self.name}: flops_per_s[{dtype}]", rate)
        _above(f"{self.name}: bytes_per_s", self.bytes_per_s)
        _above(f"{self.name}: memory_bytes", self.memory_bytes)
        _above(f"{self.name}: processors", self.processors)

    def rate(self, dtype: str) -> float:
        """Flops a second that products in `dtype` are promised."""
        return self.flops_per_s.get(dtype) or self.flops_per_s.get("float32") or max(self.flops_per_s.values())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One level. bytes_per_s: of one device (of a host: its share), in one direction, promised; `ranks`: devices that
    it joins at most (those of a host, of a pod), None: all.

    efficiency: the share that large messages reach; latency_s: of one hop; half_bytes: a message of so many bytes
    reaches half of the bandwidth besides; 0: latency alone.
    """

    name: str
    bytes_per_s: float
    latency_s: float
    ranks: int | None = None
    efficiency: float = 0.8
    half_bytes: float = 0.0

    def __post_init__(self) -> None:
        _above(f"link {self.name}: bytes_per_s", self.bytes_per_s)
        _at_least(f"link {self.name}: latency_s", self.latency_s, 0.0)
        _at_least(f"link {self.name}: half_bytes", self.half_bytes, 0.0)
        _share(f"link {self.name}: efficiency", self.efficiency)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hosts:
    """`count` equal hosts of `devices` devices each."""

    device: Device
    devices: int
    count: int = 1

    def __post_init__(self) -> None:
        _above("devices of a host", self.devices)
        _above("hosts", self.count)

    @property
    def num_devices(self) -> int:
        return self.devices * self.count


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """What a step costs beside its kernels and messages.

    action_s: the program's own time for one action of a schedule; step_s: for one step (data, logging, the optimizer's
    start). framework_bytes: held by the runtime on every device before a model is there; `slack`: the share of the
    allocator's bytes that fragments take. overlap: of communication that may run beside compute, the share that is
    hidden; beside: how much longer compute takes while it does, as a share.
    """

    action_s: float = 0.0
    step_s: float = 0.0
    framework_bytes: int = 0
    slack: float = 0.0
    overlap: float = 1.0
    beside: float = 0.0

    def __post_init__(self) -> None:
        for name in ("action_s", "step_s", "framework_bytes", "slack", "beside"):
            _at_least(name, getattr(self, name), 0.0)
        _share("overlap", self.overlap, zero=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts, in the order in which ranks are placed on them, and links, lowest level first. Raises `ConfigError`."""

    hosts: tuple[Hosts, ...]
    links: tuple[Link, ...]
    overheads: Overheads = Overheads()
    name: str = ""

    def __post_init__(self) -> None:
        if not self.hosts or not self.links:
            raise ConfigError("a cluster has hosts and links, but got none of one; add [[hosts]] and [[links]]")
        joined = [link.ranks for link in self.links]
        if None in joined[:-1] or joined[-1] is not None:
            raise ConfigError(f"every link but the last joins so many ranks, the last all: got {joined}; set `ranks`")
        sizes = [ranks for ranks in joined if ranks is not None]
        if sizes != sorted(sizes):
            raise ConfigError(f"links stand in the order of what they join, but got {sizes}; sort them")

    @property
    def num_devices(self) -> int:
        """Ranks, at one a device."""
        return sum(hosts.num_devices for hosts in self.hosts)

    @property
    def is_uniform(self) -> bool:
        """Whether all devices are of one kind."""
        return len({hosts.device.name for hosts in self.hosts}) == 1

    def device_of(self, rank: int) -> Device:
        """The device that a rank computes on; ranks fill hosts in order."""
        for hosts in self.hosts:
            if rank < hosts.num_devices:
                return hosts.device
            rank -= hosts.num_devices
        raise ConfigError(f"ranks are 0 to {self.num_devices - 1}, but asked for one {rank + 1} beyond the last")


def _share(name: str, value: float, *, zero: bool = False) -> None:
    if not (0 <= value <= 1 and (zero or value > 0)):
        raise ConfigError(f"{name} is a share, {'0' if zero else 'above 0'} to 1, but got {value}; mend it")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name} is {least:g} or more, but got {value}; mend it")


def _above(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} is above 0, but got {value}; mend it")
