"""Bytes that several ranks send each other at once: one message for each pair and direction, sizes known to both.

Knows bytes and ranks; refuses to know what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from shardwise.errors import TransferError

__all__ = ["exchange"]


def exchange(sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> None:
    """Send `sends[peer]` and fill `receives[peer]`, contiguous tensors, on the default group; back when all is done.

    Every rank calls it with what its peers expect. Raises `TransferError` where a peer is gone.
    """
    operations = [dist.P2POp(dist.irecv, tensor, peer) for peer, tensor in sorted(receives.items())]
    operations += [dist.P2POp(dist.isend, tensor, peer) for peer, tensor in sorted(sends.items())]
    if not operations:
        return
    try:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    except RuntimeError as error:
        raise TransferError(
            f"{len(operations)} messages with ranks {sorted({*sends, *receives})} were under way, but {error}; see "
            "what ended there"
        ) from error
