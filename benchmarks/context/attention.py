"""Attention alone, forward and backward, divided between ranks in several ways, and whole. Knows no models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.context.model import Shape
from benchmarks.context.ranks import Timed
from shardwise.comm.same_host import same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.launch import RankContext
from shardwise.parallel.context.placement import Placement
from shardwise.parallel.context.ring import ring_attention
from shardwise.parallel.context.ulysses import ulysses_attention

__all__ = ["WAYS", "WHOLE", "timed_attention"]

WHOLE = "one device"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A function, and how it wants tokens dealt out."""

    attention: Callable[..., torch.Tensor]
    zigzag: bool


WAYS: Mapping[str, Way] = {
    "ring, zigzag": Way(attention=ring_attention, zigzag=True),
    "ring, contiguous": Way(attention=ring_attention, zigzag=False),
    "ulysses, contiguous": Way(attention=ulysses_attention, zigzag=False),
    "ulysses, zigzag": Way(attention=ulysses_attention, zigzag=True),
}


def timed_attention(
    context: RankContext, shape: Shape, sequence: int, names: Sequence[str], rounds: int
) -> dict[str, Timed]:
    """Causal attention on this rank by the clock, the ways in turn. WHOLE computes on rank 0 alone."""
    torch.set_num_threads(1)
    q, k, v = _inputs(shape, sequence)
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    timed = {name: Timed() for name in names}
    with same_host_transport(range(context.world_size)) as shared:
        group = SameHostGroup(shared, range(context.world_size), context.rank)
        for turn in range(rounds + 1):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                placement = Placement(size=sequence, contexts=group.size, zigzag=name != WHOLE and WAYS[name].zigzag)
                own = [
                    x if name == WHOLE else placement.own(x, 2, group.rank).contiguous() for x in (q, k, v, gradient)
                ]
                with timed[name].once(counts=turn > 0):  # the first warms up
                    if name != WHOLE:
                        _divided(WAYS[name], placement, group, own)
                    elif context.rank == 0:
                        _whole(own)
    return timed


def _inputs(shape: Shape, sequence: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(1, heads, sequence, head_dim), keys and values with theirs."""
    made = torch.Generator().manual_seed(2)
    q = torch.randn(1, shape.heads, sequence, shape.head_dim, generator=made)
    k, v = (torch.randn(1, shape.kv_heads, sequence, shape.head_dim, generator=made) for _ in range(2))
    return q, k, v


def _divided(way: Way, placement: Placement, group: SameHostGroup, own: Sequence[torch.Tensor]) -> None:
    leaves = [x.requires_grad_() for x in own[:3]]
    out = way.attention(*leaves, group=group, tokens=placement, is_causal=True)
    torch.autograd.grad(out, leaves, own[3])


def _whole(own: Sequence[torch.Tensor]) -> None:
    leaves = [x.detach().requires_grad_() for x in own[:3]]
    out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True, enable_gqa=True)
    torch.autograd.grad(out, leaves, own[3])
