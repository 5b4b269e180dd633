"""Bytes that a rank hands over, by axis and kind. Counted by those who send, read here between two steps.

    tp.all_reduce                       tensors that are summed over the shards of a unit
    tp.all_gather, tp.reduce_scatter    whole tensors, of which a rank has or gets a part: half an all-reduce of as many
    dp.all_reduce                       gradients that are summed over replicas
    dp.exchange                         what workers that train by themselves have done, every so many steps
    dp.all_gather, dp.all_to_all, …     what stands for such sums, compressed or in two levels; counted as a gather
    dp.saved, fsdp.saved, pp.saved      what compression has kept from travelling, counted as what it stands for
    fsdp.reduce_scatter, fsdp.all_gather  gradients and parameters of replicas that divide the state of training
    pp.all_reduce, tp.gradients         gradients of weights that stages share, and that are partial on every shard
    pp.send                             activations and their gradients between stages, with their headers
    ep.all_to_all                       rows that go to the ranks of other experts
    cp.send                             keys, values and their gradients between ranks that divide sequences
    cp.all_gather, cp.reduce_scatter    sequences of which somebody needs all tokens, and their gradients
    cp.all_reduce                       sums over all tokens: losses, means

Refuses to know who waits for what, and what the loss and the norm need (a few numbers a step).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shardwise.comm.point_to_point import Transport, Waitable

__all__ = ["CountedTransport", "Traffic"]


class Traffic:
    """Reads counters that only grow. One of a rank and program."""

    def __init__(self) -> None:
        self._counters: dict[str, list[Callable[[], int]]] = {}
        self._before: dict[str, int] = {}

    def add(self, kind: str, counter: Callable[[], int]) -> None:
        """From now on `kind` tells what `counter` counts, on top of what it told."""
        self._counters.setdefault(kind, []).append(counter)
        self._before[kind] = self._before.get(kind, 0) + counter()

    def read(self) -> dict[str, int]:
        """Bytes of every kind since the last call, in alphabetical order."""
        now = {kind: sum(counter() for counter in self._counters[kind]) for kind in sorted(self._counters)}
        passed = {kind: total - self._before[kind] for kind, total in now.items()}
        self._before = now
        return passed


class CountedTransport:
    """A `Transport` that counts what is sent through another one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.sent_bytes = 0

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Send, and count it."""
        self.sent_bytes += tensor.nbytes
        return self._transport.isend(tensor, peer)

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """As the other one does."""
        return self._transport.irecv(tensor, peer)
