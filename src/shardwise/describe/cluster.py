"""The machine as a value: devices, how many, and the links between them by level.

    Cluster ─┬─ hosts    of one or several kinds: so many hosts of so many devices
             └─ links    lowest level first: inside a host, between hosts, between pods

Rates are what is promised (a datasheet's), `Efficiency` the share of them that is reached, fitted or measured: physical
numbers, so that an efficiency is at most 1 and a latency at least 0. Refuses to know models and layouts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from shardwise.errors import ConfigError

__all__ = ["Cluster", "Device", "Efficiency", "HostMemory", "Hosts", "Link", "Overheads"]


def _share(name: str, value: float, *, zero: bool = False) -> None:
    if not (0 <= value <= 1 and (zero or value > 0)):
        raise ConfigError(f"{name} is a share, {'0' if zero else 'above 0'} to 1, but got {value}; mend it")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name} is {least:g} or more, but got {value}; mend it")


def _above(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} is above 0, but got {value}; mend it")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Of a device's promised rates, what is reached.

    matmul, attention, memory: the share that large ones reach.
    launch_s: of one kernel, below which none ends.
    matmul_half_flops: a product of so many flops reaches half of `matmul` (small ones fill a device badly); 0: all do.
    memory_half_bytes: likewise of bytes moved.
    pack_bytes_per_s: at which a product on a core copies its second operand (that of a linear is its weight) into the
        order that it computes in, before it computes (Goto and van de Geijn 2008); 0: it does not, or beside computing.
    update: of the memory's rate, the share that an optimizer's pass reaches; 0: `memory`.
    asked_s: of every kernel of a forward besides, in which the program asks for it, where that delays the device (a
        CPU, which runs both); a backward's are asked for by the library.
    dealt_s: of every function that the program answers itself (`KernelKind.FUNCTION`), where that delays the device.
    """

    matmul: float = 0.7
    attention: float = 0.5
    memory: float = 0.8
    launch_s: float = 5e-6
    matmul_half_flops: float = 0.0
    memory_half_bytes: float = 0.0
    pack_bytes_per_s: float = 0.0
    update: float = 0.0
    asked_s: float = 0.0
    dealt_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "memory"):
            _share(name, getattr(self, name))
        _share("update", self.update, zero=True)
        for name in ("launch_s", "matmul_half_flops", "memory_half_bytes", "pack_bytes_per_s", "asked_s", "dealt_s"):
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
    reaches half of the bandwidth besides; 0: latency alone. reduces: whether its switches add up what passes them
    (NVLS, SHARP), so that an all-reduce sends everything once; trees: whether sums may go up a tree, not round a ring
    alone. meeting_s: of a collective besides its hops, until all ranks are there and have been told (ranks that sleep
    are woken).
    """

    name: str
    bytes_per_s: float
    latency_s: float
    ranks: int | None = None
    efficiency: float = 0.8
    half_bytes: float = 0.0
    reduces: bool = False
    trees: bool = True
    meeting_s: float = 0.0

    def __post_init__(self) -> None:
        _above(f"link {self.name}: bytes_per_s", self.bytes_per_s)
        _at_least(f"link {self.name}: latency_s", self.latency_s, 0.0)
        _at_least(f"link {self.name}: half_bytes", self.half_bytes, 0.0)
        _at_least(f"link {self.name}: meeting_s", self.meeting_s, 0.0)
        _share(f"link {self.name}: efficiency", self.efficiency)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Where a device's tensors may wait: the memory of its host.

    memory_bytes: of one host, for all of its devices. link_bytes_per_s: of one device's link to it, in one direction.
    bytes_per_s: of the memory, one device's share, which an optimizer on the host passes over. Of both rates, which are
    promised, `efficiency` is reached.
    """

    memory_bytes: int
    link_bytes_per_s: float
    bytes_per_s: float
    efficiency: float = 0.8

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "link_bytes_per_s", "bytes_per_s"):
            _above(f"memory of a host: {name}", getattr(self, name))
        _share("memory of a host: efficiency", self.efficiency)

    def copy_s(self, nbytes: float) -> float:
        """Seconds of a copy there or back."""
        return nbytes / (self.link_bytes_per_s * self.efficiency)

    def pass_s(self, nbytes: float) -> float:
        """Seconds that the host's processors take to read or write so much for one device."""
        return nbytes / (self.bytes_per_s * self.efficiency)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hosts:
    """`count` equal hosts of `devices` devices each. memory: None where nothing is known of it, so that nothing is
    planned to wait there. processors: of a host whose devices are ranks that share them, all computing at their rates;
    None: every device is its own."""

    device: Device
    devices: int
    count: int = 1
    memory: HostMemory | None = None
    processors: int | None = None

    def __post_init__(self) -> None:
        _above("devices of a host", self.devices)
        _above("hosts", self.count)
        if self.processors is not None:
            _above("processors of a host", self.processors)

    @property
    def num_devices(self) -> int:
        return self.devices * self.count

    @property
    def crowd(self) -> float:
        """Ranks of one processor, 1 or more: how much faster than its rates one is that computes alone."""
        return max(1.0, self.devices / (self.processors or self.devices))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """What a step costs beside its kernels and messages.

    action_s: the program's own time for one action of a schedule; step_s: for one step (data, logging, the optimizer's
    start); kernel_s, exchange_s: for starting one kernel, one collective: a device that is faster waits for it.
    interrupted_s: what a rank loses for every other rank of a collective inside a unit, besides the collective (ranks
    that have computed since the last one wait for each other, and for a processor where they share it, and find less in
    its caches). message_s: likewise for every message inside a unit (a turn of a ring, what one rank has for another in
    an all-to-all), which the program packs, asks for, waits for and unpacks.
    crowded_s: what every hop of a collective inside a unit takes longer where pipelines cross hosts too (their messages
    share the processors that move both). framework_bytes: held by the runtime on every device before a model is there;
    `slack`: the share of the allocator's bytes that fragments take. overlap: of communication that may run beside
    compute, the share that is hidden; beside: how much longer compute takes while it does, as a share. spread: of the
    speeds of equal hosts (their clocks, their cooling, what else they do), the standard deviation: a step that all make
    together is as slow as the slowest of them.
    """

    action_s: float = 0.0
    step_s: float = 0.0
    kernel_s: float = 0.0
    exchange_s: float = 0.0
    interrupted_s: float = 0.0
    message_s: float = 0.0
    crowded_s: float = 0.0
    framework_bytes: int = 0
    slack: float = 0.0
    overlap: float = 1.0
    beside: float = 0.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _at_least(field.name, getattr(self, field.name), 0.0)
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

    @classmethod
    def local(cls, ranks: int) -> Cluster:
        """This machine with so many ranks on its cores, not measured: rates are a typical server core's, of which a
        rank has its share where there are more ranks than cores. `shardwise probe` writes what it is."""
        cores = os.cpu_count() or 1
        share = min(1.0, cores / ranks)
        delay_s = 25e-6 / share  # what a program adds to every kernel, as the flops and bytes that take as long
        reached = Efficiency(matmul=0.75, attention=0.2, memory=0.4, launch_s=3e-6, update=0.6)
        flops_per_s, bytes_per_s = 60e9 * share, 12e9 * share
        reached = dataclasses.replace(
            reached,
            matmul_half_flops=delay_s * flops_per_s * reached.matmul,
            memory_half_bytes=delay_s * bytes_per_s * reached.memory,
            pack_bytes_per_s=14e9 * share,
            dealt_s=60e-6 / share,
        )
        device = Device(
            name="CPU core",
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks,
            flops_per_s={"float32": flops_per_s, "bfloat16": flops_per_s},
            bytes_per_s=bytes_per_s,
            efficiency=reached,
        )
        link = Link(name="shared memory", bytes_per_s=6e9 * share, latency_s=30e-6 / share, meeting_s=150e-6 / share)
        overheads = Overheads(
            action_s=150e-6 / share,
            step_s=2e-3 / share,
            interrupted_s=1e-4 / share,
            message_s=1e-4 / share,
            framework_bytes=200 << 20,
            overlap=0.0,
        )
        return cls(
            hosts=(Hosts(device=device, devices=ranks, processors=min(cores, ranks)),),
            links=(link,),
            overheads=overheads,
            name=f"local{ranks}",
        )

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
