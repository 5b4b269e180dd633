"""A transport between ranks of one host, through shared memory; every other pair goes by the process group.

Knows tensors and ranks, not how bytes cross (`same_host_channel`) nor how the ranks found each other
(`same_host_meeting`). There are no threads: what is under way moves when a rank sends or waits.
"""

from __future__ import annotations

import dataclasses
import select
import time
from collections.abc import Callable, Collection, Mapping

import torch
import torch.distributed as dist

from shardwise.comm.point_to_point import ProcessGroupTransport, Transport, Waitable
from shardwise.comm.same_host_channel import Channel, Receipt
from shardwise.comm.same_host_meeting import connect
from shardwise.errors import TransferError

__all__ = ["SameHostTransport", "same_host_transport"]


def same_host_transport(peers: Collection[int], *, timeout_s: float | None = None) -> SameHostTransport:
    """The transport of this rank to `peers`, ranks of the default group. Collective: every rank of the group calls it.

    Two ranks are connected where each names the other, and both are processes of one user on one host (and in one
    container). A wait that takes longer than `timeout_s` is an error; without it, the group's timeout holds. Close it,
    or use `with`.
    """
    timeout_s = _timeout_of_group() if timeout_s is None else timeout_s
    channels = connect(peers, timeout_s=timeout_s)
    return SameHostTransport(channels, timeout_s=timeout_s)


class SameHostTransport:
    """A `Transport` over channels, by rank. Sends copy: a tensor may be written again at once."""

    def __init__(self, channels: Mapping[int, Channel], *, timeout_s: float, others: Transport | None = None) -> None:
        self._channels = dict(channels)
        self._timeout_s = timeout_s
        self._others = others or ProcessGroupTransport()

    @property
    def connected(self) -> frozenset[int]:
        """The ranks that are reached through shared memory."""
        return frozenset(self._channels)

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Send a contiguous tensor; never waits for the peer."""
        channel = self._channels.get(peer)
        if channel is None or tensor.device.type != "cpu":
            return self._others.isend(tensor, peer)
        if not _is_plain(tensor):
            raise _not_plain(tensor, f"sent to rank {peer}")
        return _Sent(self, channel, channel.send(tensor.data_ptr(), tensor.nbytes))

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Have the next message of `peer` put into a contiguous tensor of as many bytes."""
        channel = self._channels.get(peer)
        if channel is None or tensor.device.type != "cpu":
            return self._others.irecv(tensor, peer)
        if not _is_plain(tensor):
            raise _not_plain(tensor, f"received from rank {peer}")
        receipt = Receipt(tensor.data_ptr(), tensor.nbytes, tensor)
        channel.post(receipt)
        return _Received(self, channel, receipt)

    def wait_until(self, is_done: Callable[[], bool], channel: Channel) -> None:
        """Move what is under way until a channel has done something. RuntimeError if its peer is gone or silent."""
        limit = 0.0
        while not is_done():
            now = time.monotonic()
            limit = limit or now + self._timeout_s
            if channel.closed_by_peer:
                raise RuntimeError(f"rank {channel.peer} closed the channel: it has ended")
            if now >= limit:
                raise RuntimeError(f"rank {channel.peer} took longer than {self._timeout_s:g} s")
            if len(self._channels) == 1 and not channel.has_unwritten:
                channel.read(wait=True)
            else:
                self._move_any(limit - now)

    def _move_any(self, timeout_s: float) -> None:
        """Wait until something moves on any channel: peers may need to be read from, or written to, to go on."""
        poll = select.poll()
        open_channels = {channel.fileno(): channel for channel in self._channels.values() if not channel.closed_by_peer}
        for descriptor, channel in open_channels.items():
            poll.register(descriptor, select.POLLIN | (select.POLLOUT if channel.has_unwritten else 0))
        for descriptor, event in poll.poll(timeout_s * 1e3):
            if event & ~select.POLLOUT:
                open_channels[descriptor].read(wait=False)
            if event & select.POLLOUT:
                open_channels[descriptor].flush()

    def flush(self) -> None:
        """Write what sockets take now: for who waits for something else."""
        for channel in self._channels.values():
            if channel.has_unwritten and not channel.closed_by_peer:
                channel.flush()

    def close(self) -> None:
        """Let go of all channels; peers that still wait for this rank get an error."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def __enter__(self) -> SameHostTransport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    """A message that is copied, and perhaps not written to the socket yet."""

    transport: SameHostTransport
    channel: Channel
    position: int

    def wait(self) -> None:
        if self.channel.written < self.position:
            self.transport.wait_until(lambda: self.channel.written >= self.position, self.channel)


@dataclasses.dataclass(frozen=True, slots=True)
class _Received:
    """A message that is under way to its tensor."""

    transport: SameHostTransport
    channel: Channel
    receipt: Receipt

    def wait(self) -> None:
        if not self.receipt.done:
            self.transport.wait_until(lambda: self.receipt.done, self.channel)
        if self.receipt.error is not None:
            raise RuntimeError(self.receipt.error)


def _timeout_of_group() -> float:
    """Seconds that an operation of the default group may take."""
    group = dist.distributed_c10d._get_default_group()
    options = group._get_backend(torch.device("cpu")).options
    return float(options._timeout.total_seconds())


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _not_plain(tensor: torch.Tensor, what: str) -> TransferError:
    return TransferError(
        f"only contiguous tensors cross between ranks; one of shape {tuple(tensor.shape)} and strides "
        f"{tensor.stride()} was to be {what}; call .contiguous() (and .resolve_conj()) first"
    )
