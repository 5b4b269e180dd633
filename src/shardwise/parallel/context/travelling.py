"""Keys and values on their way around a ring, and behind them their gradients. Knows messages; no attention.

    rank 1   k,v of 0 ──► computes ──► + d(k, v) of 0 from those before ──► on to the next, or home to 0

Every turn asks for the keys of the next one before it is computed. Sends are waited for two turns later: who gets them
has asked by then, so nobody waits in a circle; what goes home is asked for last, and waited for last.
"""

from __future__ import annotations

import collections
import math

import torch

from shardwise.comm.point_to_point import Waitable
from shardwise.parallel.context.links import Links
from shardwise.parallel.context.route import Route

__all__ = ["Travelling", "UnderWay"]

UnderWay = tuple[Waitable, torch.Tensor]  # a message, alive until it has arrived
_UNDER_WAY = 2  # messages of the last turn: keys with values, and their gradients


class Travelling:
    """One round of the keys and values of all ranks, seen from one. Turns are those of `route.sources`.

    A message is (samples · kv_heads · tokens · (d + dv),).
    """

    def __init__(self, group: Links, route: Route, k: torch.Tensor, v: torch.Tensor) -> None:
        """`k` and `v` are this rank's own."""
        self._group = group
        self._route = route
        self._own = k, v
        self._sent: collections.deque[UnderWay] = collections.deque()
        self._homeward: list[UnderWay] = []
        self._coming: UnderWay | None = None

    def take(self, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v of the source whose turn it is, given on to who is next; those of the next turn are asked for."""
        route = self._route
        source = route.sources[turn]
        self._let_go()
        if turn == 0:
            k, v = self._own
            message = None
        else:
            assert self._coming is not None
            work, message = self._coming
            work.wait()
            k, v = self._halves(message, source)
        after = route.after(source)
        if after is not None:
            self._send(self._packed(k, v, source, k.dtype) if message is None else message, after)
        if turn + 1 < len(route.sources):
            coming = route.sources[turn + 1]
            self._coming = self._asked_for(coming, route.before(coming), k.dtype)
        return k, v

    def gradients_of(self, source: int, dtype: torch.dtype) -> UnderWay | None:
        """Ask for the gradients of `source`'s keys that were made before this rank; None where it is the first."""
        if source == self._route.own or self._route.is_first(source):
            return None
        return self._asked_for(source, self._route.before(source), dtype)

    def hand_on(self, source: int, dk: torch.Tensor, dv: torch.Tensor, arriving: UnderWay | None) -> None:
        """Add what this rank made of the gradients of another's keys, and send them to the next, or home."""
        if arriving is None:
            message = self._packed(dk, dv, source, dk.dtype)
        else:
            work, message = arriving
            work.wait()
            for half, made in zip(self._halves(message, source), (dk, dv), strict=True):
                half.add_(made)
        after = self._route.after(source)
        if after is None:
            self._homeward.append((self._group.isend(message, source), message))
        else:
            self._send(message, after)

    def bring_home(self, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Add what the others made of the gradients of this rank's keys."""
        own = self._route.own
        way = self._route.way(own)
        if not way:
            return
        work, message = self._asked_for(own, way[-1], dk.dtype)
        work.wait()
        for half, made in zip(self._halves(message, own), (dk, dv), strict=True):
            made.add_(half)

    def finish(self) -> None:
        """Until all that was sent may be let go."""
        for work, _ in (*self._sent, *self._homeward):
            work.wait()

    def _send(self, message: torch.Tensor, peer: int) -> None:
        """To a rank that has asked for it, or will in its next turn."""
        self._sent.append((self._group.isend(message, peer), message))

    def _let_go(self) -> None:
        while len(self._sent) > _UNDER_WAY:
            self._sent.popleft()[0].wait()

    def _asked_for(self, source: int, peer: int, dtype: torch.dtype) -> UnderWay:
        room = self._room(source, dtype)
        return self._group.irecv(room, peer), room

    def _room(self, source: int, dtype: torch.dtype) -> torch.Tensor:
        """For what belongs to `source`."""
        k, v = self._own
        num = k.shape[0] * k.shape[1] * self._route.keys.num(source) * (k.shape[-1] + v.shape[-1])
        return torch.empty(num, dtype=dtype, device=k.device)

    def _halves(self, message: torch.Tensor, source: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A message as k and v."""
        k, v = self._own
        shape = (*k.shape[:2], self._route.keys.num(source))
        num = math.prod(shape) * k.shape[-1]
        return message[:num].view(*shape, k.shape[-1]), message[num:].view(*shape, v.shape[-1])

    def _packed(self, k: torch.Tensor, v: torch.Tensor, source: int, dtype: torch.dtype) -> torch.Tensor:
        """k and v, or their gradients, as a message."""
        message = self._room(source, dtype)
        for half, value in zip(self._halves(message, source), (k, v), strict=True):
            half.copy_(value)
        return message
