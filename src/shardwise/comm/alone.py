"""A process group of which one rank is here: nobody answers, nothing is waited for, buffers stay as they are.

torch's "fake" backend stands for the others, so that whoever talks to a group goes the way it goes in a job; messages
of the pipeline have a transport of their own. Values that the others would have sent are not made up: who reads them
reads its own, or what was there. Refuses to know what is exchanged, and why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwise.comm.collective import Done
from shardwise.errors import LaunchError

__all__ = ["AloneTransport", "alone"]

_BACKEND = "fake"


@contextlib.contextmanager
def alone(*, rank: int, world_size: int) -> Iterator[None]:
    """Inside, this process is rank `rank` of `world_size`, and the only one. Raises `LaunchError` in a real group."""
    if dist.is_initialized():
        raise LaunchError(
            f"a rank that is alone has no other group, but this process is rank {dist.get_rank()} of "
            f"{dist.get_world_size()}; start one process by itself"
        )
    dist.init_process_group(_BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class AloneTransport:
    """A `Transport`: messages leave, and what should arrive is a tensor of the right shape."""

    def isend(self, tensor: torch.Tensor, peer: int) -> Done:
        """It has left."""
        return Done()

    def irecv(self, tensor: torch.Tensor, peer: int) -> Done:
        """It is there."""
        return Done()
