"""Devices that can be had, and clusters of them by name: "h100x8x4" is four hosts of eight H100s.

    DEVICE            one                            DEVICExN      N, in hosts as large as they are sold
    DEVICExNxHOSTS    N in each of so many hosts     A+B           hosts of both, in that order
    localN            N ranks on this machine's cores (as many as there are cores, without N), by estimate;
                      `shardwise probe` measures them

Numbers stand in `devices.toml`, each with its source. A name is found however it is written: "H100", "h100-sxm", what
torch calls the device. Knows what is promised and typical; refuses to measure.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from shardwise.describe.cluster import Cluster, Device, HostMemory, Hosts, Link, Overheads
from shardwise.describe.cluster_file import read_clusters, value_from
from shardwise.errors import ConfigError

__all__ = ["Entry", "entries", "find_device", "load_cluster", "named_cluster"]

_MAKERS = re.compile(r"\b(nvidia|amd|instinct|geforce|tesla)\b")
_LOCAL = re.compile(r"local(\d*)")
_FRAMEWORK_BYTES = 2 << 30  # of a device: the context of the driver, libraries, buffers of collectives
_SPREAD = 0.01  # of hosts' speeds: NVIDIA's steps on 2 to 256 hosts, with equal work a device, ask for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A device as it is sold: its other names, `devices_of_host` in one host, the link `inside` it and the one
    `between` hosts, the memory of such a host (None: the device has it itself), and where the numbers are from."""

    device: Device
    inside: Link
    between: Link
    devices_of_host: int = 8
    host: HostMemory | None = None
    names: tuple[str, ...] = ()
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All of the catalogue."""
    tables = tomllib.loads(Path(__file__).with_name("devices.toml").read_text(encoding="utf-8"))
    return tuple(value_from(Entry, each, f"entries[{i}]") for i, each in enumerate(tables["entries"]))


def find_device(name: str) -> Entry:
    """By its name, one of its other names, or its first words, if no other device begins so. Raises `ConfigError`."""
    found = _found(name)
    if found is not None:
        return found
    known = sorted(each.device.name for each in entries())
    names = {_plain(own): each.device.name for each in entries() for own in (each.device.name, *each.names)}
    near = difflib.get_close_matches(_plain(name), names, n=1, cutoff=0.5)
    meant = "".join(f"; did you mean {names[each]}?" for each in near)
    raise ConfigError(
        f"{name!r} is no device of the catalogue{meant or '; write a cluster file for it'}. The catalogue has "
        f"{', '.join(known)}"
    )


def named_cluster(text: str) -> Cluster:
    """ "h100x8x4", "a100", "h100x64", "h100x8x2+a100x8x2", "local4": see above. Raises `ConfigError`.

    Where kinds of devices are mixed, each level is as fast as its slowest link. One host has a link to others, too, so
    that more of them can be planned with.
    """
    local = _LOCAL.fullmatch(text.strip().lower())
    if local is not None:
        return Cluster.local(int(local[1] or os.cpu_count() or 1))
    parts = [_hosts(part.strip()) for part in text.split("+")]
    hosts = tuple(hosts for _, hosts in parts)
    inside = _slowest(entry.inside for entry, _ in parts)
    of_host = min(each.devices for each in hosts)
    overheads = Overheads(framework_bytes=_FRAMEWORK_BYTES, spread=_SPREAD)
    between = _slowest(entry.between for entry, _ in parts)
    links = (dataclasses.replace(inside, ranks=of_host), dataclasses.replace(between, ranks=None))
    return Cluster(hosts=hosts, links=links if of_host > 1 else links[1:], name=text, overheads=overheads)


def load_cluster(text: str, *, ranks: int | None = None) -> Cluster:
    """A cluster by name, or of a file ending in .toml. Raises `ConfigError`.

    Of a file with several, the one with `ranks` devices, or the smallest that has more; "cluster.toml@4" asks for four.
    The first if nothing is asked for.
    """
    path, _, wanted = text.rpartition("@") if re.search(r"\.toml@\d+$", text) else (text, "", "")
    if not path.endswith(".toml"):
        return named_cluster(text)
    found = read_clusters(path)
    number = int(wanted) if wanted else ranks
    if number is None or len(found) == 1:
        return found[0]
    enough = [cluster for cluster in found if cluster.num_devices >= number]
    if enough:
        return min(enough, key=lambda cluster: cluster.num_devices)
    have = sorted(cluster.num_devices for cluster in found)
    raise ConfigError(
        f"{path} has clusters of {', '.join(map(str, have))} devices, but {number} were asked for; ask for fewer, "
        f"or measure it: shardwise probe --ranks {','.join(map(str, [*have, number]))}"
    )


def _slowest(links: Iterator[Link]) -> Link:
    return min(links, key=lambda link: link.bytes_per_s * link.efficiency)


def _hosts(text: str) -> tuple[Entry, Hosts]:
    """Of one kind. Names of devices may hold an x and digits, so the longest name that is one counts."""
    pieces = text.split("x")
    for last in range(len(pieces), 0, -1):
        numbers = pieces[last:]
        entry = _found("x".join(pieces[:last])) if len(numbers) <= 2 and all(map(str.isdigit, numbers)) else None
        if entry is None:
            continue
        counts = [int(number) for number in numbers]
        if 0 in counts:
            raise ConfigError(
                f"{text!r} has no devices; write {pieces[0]}x8, or {pieces[0]}x8x4 for four hosts of eight"
            )
        devices, count = (counts + [1, 1])[:2]
        if len(counts) == 1 and devices > entry.devices_of_host:
            if devices % entry.devices_of_host:
                raise ConfigError(
                    f"{text!r}: {devices} {entry.device.name} are no whole number of hosts of {entry.devices_of_host}; "
                    "give both, as in h100x8x4"
                )
            devices, count = entry.devices_of_host, devices // entry.devices_of_host
        return entry, Hosts(device=entry.device, devices=devices, count=count, memory=entry.host)
    find_device(re.sub(r"(x\d+)+$", "", text))
    raise ConfigError(f"{text!r} is no cluster; write DEVICExDEVICES, DEVICExDEVICESxHOSTS or a file ending in .toml")


def _found(name: str) -> Entry | None:
    wanted = _plain(name)
    if not wanted:
        return None
    exact = [each for each in entries() if wanted in map(_plain, (each.device.name, *each.names))]
    begun = [each for each in entries() if wanted in _beginnings((each.device.name, *each.names))]
    found = exact or begun
    return found[0] if len(found) == 1 else None


def _beginnings(names: Iterable[str]) -> set[str]:
    """Of whole words: an H20 is no H200."""
    words = [re.split(r"[\s-]+", name) for name in names]
    return {_plain("".join(each[:count])) for each in words for count in range(1, len(each))}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _MAKERS.sub("", name.lower()))
