"""How far the clocks of ranks are apart, so that what they did can be drawn on one axis.

    rank 0   t0 ────────────────────── t3        offset of the other clock: ((t1 - t0) + (t2 - t3)) / 2
                ping ↘          ↗ pong            wrong by half the round trip at most, when one way took all of it
    rank r          t1 ───── t2                   so the quickest of several rounds is believed

(Cristian 1989; the same estimate as in NTP, RFC 5905 section 8.) Ranks of one host read one clock and are not asked.
Knows the monotonic clocks of processes; refuses to know what happened when.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from shardwise.errors import TransferError

__all__ = ["ClockOffset", "Round", "clock_offsets", "host_of_clock", "offset_of"]

_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class Round:
    """One ping and its pong: `t0_s` and `t3_s` by the clock of who asks, `t1_s` and `t2_s` by the other's."""

    t0_s: float
    t1_s: float
    t2_s: float
    t3_s: float

    @property
    def on_the_way_s(self) -> float:
        """Seconds that ping and pong took together."""
        return (self.t3_s - self.t0_s) - (self.t2_s - self.t1_s)

    @property
    def offset_s(self) -> float:
        """The other's clock minus the own, if both ways took as long."""
        return ((self.t1_s - self.t0_s) + (self.t2_s - self.t3_s)) / 2


@dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """A rank's clock minus that of rank 0, wrong by `error_s` at most. Both are 0 where the clock is the same."""

    offset_s: float = 0.0
    error_s: float = 0.0


def offset_of(rounds: Sequence[Round]) -> ClockOffset:
    """What several rounds say. Raises TransferError if there are none."""
    if not rounds:
        raise TransferError("clocks are compared by one round at least, but there are 0; ask more often")
    best = min(rounds, key=lambda each: each.on_the_way_s)
    return ClockOffset(offset_s=best.offset_s, error_s=max(best.on_the_way_s, 0.0) / 2)


def clock_offsets(
    rank: int,
    world_size: int,
    *,
    now: Callable[[], float] = time.perf_counter,
    host: str | None = None,
    device: torch.device | str = "cpu",
    rounds: int = _ROUNDS,
) -> tuple[ClockOffset, ...]:
    """[r]: how far the clock `now` of rank r is ahead of rank 0's. Collective; every rank gets all.

    Ranks with the same `host` share a clock, so one of each host is asked; by default it is what the operating system
    says of it. Raises TransferError if `rounds` is 0.
    """
    if world_size == 1:
        return (ClockOffset(),)
    hosts = [""] * world_size
    dist.all_gather_object(hosts, host_of_clock() if host is None else host)
    asked = {hosts[r]: r for r in reversed(range(world_size))}  # the first rank of each
    mine: dict[str, ClockOffset] = {hosts[0]: ClockOffset()}
    for name, other in sorted(asked.items(), key=lambda item: item[1]):
        if other == 0:
            continue
        if rank == 0:
            mine[name] = offset_of([_ask(other, now, device) for _ in range(rounds)])
        elif rank == other:
            for _ in range(rounds):
                _answer(now, device)
    told: list[dict[str, ClockOffset]] = [mine]
    dist.broadcast_object_list(told, src=0)
    return tuple(told[0][name] for name in hosts)


def host_of_clock() -> str:
    """The same text in all processes whose monotonic clock is the same one: one boot, one time namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:  # another system, or an old one: nobody shares
        return f"{socket.gethostname()} {os.getpid()}"


def _ask(other: int, now: Callable[[], float], device: torch.device | str) -> Round:
    ping = torch.zeros(2, dtype=torch.float64, device=device)
    t0_s = now()
    dist.send(ping, other)
    dist.recv(ping, other)
    t1_s, t2_s = ping.tolist()  # waits for it on a GPU
    return Round(t0_s=t0_s, t1_s=t1_s, t2_s=t2_s, t3_s=now())


def _answer(now: Callable[[], float], device: torch.device | str) -> None:
    pong = torch.empty(2, dtype=torch.float64, device=device)
    dist.recv(pong, 0)
    pong[0].item()  # waits for it on a GPU
    t1_s = now()
    dist.send(torch.tensor([t1_s, now()], dtype=torch.float64, device=device), 0)
