"""Sums in two levels: inside each host, then between hosts over parts, then inside each host again.

    host A   r0 r1 ── scatter ──► r0: part 0   r1: part 1         each part crosses between hosts once a pair of ranks
    host B   r2 r3 ── scatter ──► r2: part 0   r3: part 1         of the same place, so 1/ranks-of-a-host of the bytes
             r0 + r2 sum part 0, r1 + r3 part 1; both hosts gather

(NCCL's and Horovod's hierarchical all-reduce; Jia et al. 2018, arXiv:1807.11205.) All hosts have as many ranks of the
group. Knows two collectives, one of each level; refuses to know how they move bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from shardwise.comm.collective import KINDS, Collective
from shardwise.comm.compress.lossy import Then
from shardwise.comm.point_to_point import Waitable

__all__ = ["HierarchicalCollective"]


class HierarchicalCollective:
    """`inside` are this rank's host's ranks, `between` those at its place on all hosts. `place_of[h][i]` is the place
    in the group of rank i of host h."""

    def __init__(
        self, inside: Collective, between: Collective, *, place_of: tuple[tuple[int, ...], ...], rank: int
    ) -> None:
        self._inside: Final = inside
        self._between: Final = between
        self._rank: Final = rank
        self._places = torch.tensor(place_of).t().reshape(-1)  # by i, then by host

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._inside.size * self._between.size

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """Of both levels."""
        return {k: self._inside.sent_bytes.get(k, 0) + self._between.sent_bytes.get(k, 0) for k in KINDS}

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Collective`."""
        return self._inside.empty(numel, dtype)

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        part = -(-flat.numel() // self._inside.size)
        whole = flat
        if part * self._inside.size != flat.numel():
            whole = torch.zeros(part * self._inside.size, dtype=flat.dtype, device=flat.device)
            whole[: flat.numel()] = flat
        own = whole[self._inside.rank * part : (self._inside.rank + 1) * part]

        def rest() -> None:
            self._between.all_reduce(own).wait()
            self._inside.all_gather(own, whole).wait()
            if whole is not flat:
                flat.copy_(whole[: flat.numel()])

        return Then(self._inside.reduce_scatter(whole, own), rest)

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        ordered = flat.view(self.size, -1)[self._places].view(-1)  # parts of the ranks at one place side by side
        half = torch.empty(out.numel() * self._between.size, dtype=flat.dtype, device=flat.device)

        def rest() -> None:
            self._between.reduce_scatter(half, out).wait()

        return Then(self._inside.reduce_scatter(ordered, half), rest)

    def all_gather(self, own: torch.Tensor, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        half = torch.empty(own.numel() * self._between.size, dtype=own.dtype, device=own.device)

        def rest() -> None:
            ordered = torch.empty_like(flat)
            self._inside.all_gather(half, ordered).wait()
            flat.view(self.size, -1)[self._places] = ordered.view(self.size, -1)

        return Then(self._between.all_gather(own, half), rest)

    def all_to_all(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`: what is for one place of all hosts goes to it inside the host, then to the hosts."""
        ours, hosts = self._inside.size, self._between.size
        by_place = flat.view(self.size, -1)[self._places].view(-1)  # (place i, host, m)
        came = torch.empty_like(by_place)

        def rest() -> None:
            # (from i, to host, m) -> (to host, from i, m)
            outgoing = came.view(ours, hosts, -1).transpose(0, 1).reshape(-1)
            theirs = torch.empty_like(outgoing)  # (from host, from i, m)
            self._between.all_to_all(outgoing, theirs).wait()
            ordered = theirs.view(hosts, ours, -1).transpose(0, 1).reshape(self.size, -1)  # by i, then by host
            out.view(self.size, -1)[self._places] = ordered

        return Then(self._inside.all_to_all(by_place, came), rest)
