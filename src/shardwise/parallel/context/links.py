"""How ranks that divide sequences reach each other: tensors from one to another, by their numbers in the group.

Knows the shape of a group, and checks of what attention is given; no attention.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from shardwise.comm.point_to_point import Waitable
from shardwise.errors import DataflowError, ModelError
from shardwise.parallel.context.placement import Placement

__all__ = ["Links", "as_autocast", "check_tokens", "four_dims", "whole_keep"]


class Links(Protocol):
    """The ranks that divide a sequence, seen from one of them. A pair's sends and receives match in order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Send a contiguous tensor, which is not written until waited for."""
        ...

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Have the next message of `peer` put into a contiguous tensor. Waited for once, in the order of the calls."""
        ...


def check_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Placement, keys: Placement, group: Links
) -> None:
    """Raises DataflowError unless the tensors have this rank's tokens, ModelError for heads that do not fit."""
    if queries.contexts != group.size or keys.contexts not in (1, group.size):
        raise DataflowError(
            f"{group.size} ranks divide the queries among all of them and the keys among all or none; the placements "
            f"say {queries.contexts} and {keys.contexts}"
        )
    here = group.rank if keys.contexts > 1 else 0
    expected = queries.num(group.rank), keys.num(here), keys.num(here)
    got = tuple(x.shape[-2] for x in (q, k, v))
    if got != expected:
        raise DataflowError(
            f"rank {group.rank} of {group.size} has {expected[0]} of {queries.size} queries and {expected[1]} of "
            f"{keys.size} keys; attention was given {got[0]} queries, {got[1]} keys and {got[2]} values"
        )
    if q.shape[0] != k.shape[0] or k.shape[:2] != v.shape[:2] or (k.shape[1] == 0) != (q.shape[1] == 0):
        raise ModelError(
            f"attention over divided sequences takes as many samples of q, k and v, and as many heads of k and v; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; expand them first"
        )
    if k.shape[1] and q.shape[1] % k.shape[1]:
        raise ModelError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads; repeat the key heads first")


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What attention computes with under autocast, which knows torch's attention and not this one."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.dtype != torch.float64 else tensor for tensor in tensors)


def four_dims(mask: torch.Tensor | None, samples: int, heads: int) -> torch.Tensor | None:
    """A mask that broadcasts to (samples, heads, queries, keys), with all four dims. ModelError for another."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ModelError(f"a mask of attention is boolean or added to the scores; this one is {mask.dtype}; convert it")
    if not 2 <= mask.dim() <= 4:
        raise ModelError(f"a mask of attention has 2 to 4 dims; this one has shape {tuple(mask.shape)}; reshape it")
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[0] not in (1, samples) or mask.shape[1] not in (1, heads):
        raise ModelError(
            f"a mask of {tuple(mask.shape)} does not broadcast to {samples} samples and {heads} heads; reshape it"
        )
    return mask


def whole_keep(
    samples: int, heads: int, queries: int, keys: int, *, dropout_p: float, like: torch.Tensor
) -> torch.Tensor | None:
    """Which attention weights dropout leaves, of the whole sequence: boolean (samples, heads, queries, keys).

    Drawn by one call of dropout, as attention on one device draws it, so whoever keys the draws gives every rank the
    same; for a moment of the size of all weights. None without dropout.
    """
    if dropout_p == 0.0:
        return None
    if not 0.0 <= dropout_p <= 1.0 or math.isnan(dropout_p):
        raise ModelError(f"dropout_p is a probability, from 0 to 1; got {dropout_p}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    ones = torch.ones((), dtype=dtype, device=like.device).expand(samples, heads, queries, keys)
    return torch.nn.functional.dropout(ones, dropout_p, True) != 0
