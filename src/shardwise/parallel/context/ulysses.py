"""Ulysses attention: heads for tokens and back, all tokens of own heads between (Jacobs et al. 2023, arXiv:2309.14509).

    rank 0   all heads, tokens 0 1  │            │  heads 0 1, all tokens  │            │  all heads, tokens 0 1
    rank 1   all heads, tokens 2 3  │ all-to-all │  heads 2 3, all tokens  │ all-to-all │  all heads, tokens 2 3

Heads that ranks do not divide are dealt out unevenly; of key heads that are fewer than the ranks, every rank has those
that its query heads read. Knows tensors and the ranks of one group; no modules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from shardwise.comm.point_to_point import Waitable
from shardwise.errors import ModelError
from shardwise.parallel.context.blocks import compute_dtype
from shardwise.parallel.context.links import Links, as_autocast, check_tokens, four_dims, whole_keep
from shardwise.parallel.context.placement import Placement

__all__ = ["heads_of", "ulysses_attention"]

Heads = tuple[int, int]


def ulysses_attention(
    q: torch.Tensor,  # (samples, heads, own queries, d)
    k: torch.Tensor,  # (samples, kv_heads, own keys, d)
    v: torch.Tensor,  # (samples, kv_heads, own keys, dv)
    *,
    group: Links,
    tokens: Placement,
    keys: Placement | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """What `scaled_dot_product_attention` of the whole sequences gives own queries: (samples, heads, own queries, dv).

    Arguments and gradients are those of `ring_attention`. Each rank sends and receives (heads and twice the key heads
    and heads again) · own tokens, however many ranks there are; with fewer heads than ranks, some idle. Collective.
    """
    keys = tokens if keys is None else keys
    q, k, v = as_autocast(q, k, v)
    check_tokens(q, k, v, tokens, keys, group)
    if is_causal and mask is not None:
        raise ModelError("attention takes a mask or is_causal, not both; let the mask hide what is_causal would")
    mask = four_dims(mask, q.shape[0], q.shape[1])
    if mask is not None and (mask.shape[-2] not in (1, tokens.size) or mask.shape[-1] not in (1, keys.size)):
        raise ModelError(
            f"a mask of attention over divided sequences is given for all {tokens.size} queries and {keys.size} keys, "
            f"or broadcasts along them; this one is {tuple(mask.shape)}; give it whole on every rank"
        )
    num_heads, kv_heads = q.shape[1], k.shape[1]
    own = heads_of(num_heads, group.size, group.rank)
    read = [_read(heads_of(num_heads, group.size, rank), num_heads, kv_heads) for rank in range(group.size)]
    keep = whole_keep(q.shape[0], num_heads, tokens.size, keys.size, dropout_p=dropout_p, like=q)
    dealt = [heads_of(num_heads, group.size, rank) for rank in range(group.size)]
    if keys.contexts == 1:
        (query,) = _Gather.apply(group, [tokens], [dealt], q)  # type: ignore[no-untyped-call]
        key, value = (x[:, slice(*read[group.rank])] for x in (k, v))
    else:
        query, key, value = _Gather.apply(group, [tokens, keys, keys], [dealt, read, read], q, k, v)  # type: ignore[no-untyped-call]
    key, value = (_of_each(x, own, read[group.rank], num_heads // max(kv_heads, 1)) for x in (key, value))
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, slice(*own)]
    if keep is not None:
        keep = keep[:, slice(*own)].clone()
    given = _Given(mask=mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p, keep=keep)
    return _Scatter.apply(given.attend(query, key, value), group, tokens, dealt)  # type: ignore[no-any-return, no-untyped-call]


def heads_of(num_heads: int, ranks: int, rank: int) -> Heads:
    """[start, stop) of the query heads that a rank computes."""
    return rank * num_heads // ranks, (rank + 1) * num_heads // ranks


def _read(own: Heads, num_heads: int, kv_heads: int) -> Heads:
    """The key heads that query heads [start, stop) read."""
    start, stop = own
    if start == stop:
        return 0, 0
    shared = num_heads // kv_heads
    return start // shared, (stop - 1) // shared + 1


def _of_each(x: torch.Tensor, own: Heads, read: Heads, shared: int) -> torch.Tensor:
    """Key heads as attention groups them: evenly among own query heads, or one for each of these."""
    start, stop = own
    num = read[1] - read[0]
    even = num > 0 and (stop - start) % num == 0 and (num == 1 or start % shared == 0)
    if even or start == stop:
        return x
    return x.index_select(1, torch.tensor([head // shared - read[0] for head in range(*own)], device=x.device))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """What decides the attention of own heads over all tokens."""

    mask: torch.Tensor | None
    is_causal: bool
    scale: float | None
    dropout_p: float
    keep: torch.Tensor | None  # boolean: which weights dropout leaves

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not query.shape[1]:  # fewer heads than ranks
            return query.new_zeros((*query.shape[:-1], value.shape[-1])) + 0 * (query.sum() + key.sum() + value.sum())
        if self.keep is not None:
            return self._written_out(query, key, value, self.keep)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, is_causal=self.is_causal, scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    def _written_out(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """With dropout on the softmax; torch's own draws another mask."""
        dtype = compute_dtype(query.dtype)
        shared = query.shape[1] // key.shape[1]
        key, value = (x.to(dtype).repeat_interleave(shared, 1) for x in (key, value))
        scale = 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        scores = (query.to(dtype) * scale) @ key.transpose(-2, -1)  # (samples, own heads, queries, keys)
        if self.is_causal:
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(unseen, -math.inf)
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(self.mask.logical_not(), -math.inf)
        elif self.mask is not None:
            scores = scores + self.mask
        weights = torch._safe_softmax(scores, -1) * keep
        kept_weight = 0.0 if self.dropout_p == 1 else 1 / (1 - self.dropout_p)
        return (weights * kept_weight @ value).to(query.dtype)


# -- the exchange -------------------------------------------------------------------------------

_Lent = Sequence[Sequence[Heads]]  # [tensor][rank]: the heads that it has of all tokens; several may have the same


class _Gather(torch.autograd.Function):
    """Own tokens of all heads → all tokens of own heads, of several tensors at once: one message to each rank."""

    @staticmethod
    def forward(
        ctx: Any, group: Links, tokens: Sequence[Placement], lent: _Lent, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.tokens, ctx.lent = group, tokens, lent
        ctx.shapes = [tensor.shape for tensor in tensors]
        return tuple(_to_heads(group, tokens, lent, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, None, None, *_to_tokens(ctx.group, ctx.tokens, ctx.lent, ctx.shapes, gradients)


class _Scatter(torch.autograd.Function):
    """All tokens of own heads → own tokens of all heads."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, group: Links, tokens: Placement, dealt: Sequence[Heads]) -> torch.Tensor:
        ctx.group, ctx.tokens, ctx.dealt = group, tokens, dealt
        shape = (out.shape[0], dealt[-1][1], tokens.num(group.rank), out.shape[-1])
        return _to_tokens(group, [tokens], [dealt], [torch.Size(shape)], [out])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _to_heads(ctx.group, [ctx.tokens], [ctx.dealt], [gradient])[0], None, None, None


def _to_heads(
    group: Links, tokens: Sequence[Placement], lent: _Lent, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """[tensor]: (samples, own heads, tokens, d), from (samples, heads, own tokens, d)."""
    pieces = [
        [tensor[:, slice(*heads[rank])] for tensor, heads in zip(tensors, lent, strict=True)]
        for rank in range(group.size)
    ]
    shapes = [
        [
            (tensor.shape[0], heads[group.rank][1] - heads[group.rank][0], placement.num(rank), tensor.shape[-1])
            for tensor, placement, heads in zip(tensors, tokens, lent, strict=True)
        ]
        for rank in range(group.size)
    ]
    arrived = _exchanged(group, pieces, shapes)
    return [
        placement.join([from_rank[at] for from_rank in arrived], 2).contiguous() for at, placement in enumerate(tokens)
    ]


def _to_tokens(
    group: Links,
    tokens: Sequence[Placement],
    lent: _Lent,
    wholes: Sequence[torch.Size],
    tensors: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """[tensor]: (samples, heads, own tokens, d) as `wholes` say, from (samples, own heads, tokens, d); what several
    ranks have is summed."""
    pieces = [
        [placement.own(tensor, 2, rank) for tensor, placement in zip(tensors, tokens, strict=True)]
        for rank in range(group.size)
    ]
    shapes = [
        [
            (whole[0], heads[rank][1] - heads[rank][0], whole[2], whole[3])
            for whole, heads in zip(wholes, lent, strict=True)
        ]
        for rank in range(group.size)
    ]
    arrived = _exchanged(group, pieces, shapes)
    made = []
    for at, (whole, heads) in enumerate(zip(wholes, lent, strict=True)):
        samples, num_heads, num, dim = whole  # heads behind tokens, as projections have them
        total = tensors[at].new_empty(samples, num, num_heads, dim).transpose(1, 2)
        alone = sum(stop - start for start, stop in heads) == num_heads  # ranks have all heads, so each is of one
        if not alone:
            total.zero_()
        for rank in range(group.size):
            own = total[:, slice(*heads[rank])]
            if alone:
                own.copy_(arrived[rank][at])
            else:
                own.add_(arrived[rank][at])
        made.append(total)
    return made


def _exchanged(
    group: Links, pieces: Sequence[Sequence[torch.Tensor]], shapes: Sequence[Sequence[Sequence[int]]]
) -> list[list[torch.Tensor]]:
    """[rank]: what that rank has for this one, of `shapes`; `pieces` are what this one has for each."""
    like = pieces[0][0]
    rooms: dict[int, torch.Tensor] = {}
    messages: list[torch.Tensor] = []  # alive until they are sent
    works: list[Waitable] = []
    for peer in [(group.rank + step) % group.size for step in range(1, group.size)]:
        room = like.new_empty(sum(math.prod(shape) for shape in shapes[peer]))
        message = torch.cat([piece.reshape(-1) for piece in pieces[peer]])
        rooms[peer] = room
        messages.append(message)
        turns = (True, False) if group.rank < peer else (False, True)
        for sends in turns:  # of two the lower sends first, for transports that take a pair's messages in turn
            if sends and message.numel():
                works.append(group.isend(message, peer))
            elif not sends and room.numel():
                works.append(group.irecv(room, peer))
    for work in works:
        work.wait()
    arrived: list[list[torch.Tensor]] = []
    for rank in range(group.size):
        if rank == group.rank:
            arrived.append(list(pieces[rank]))
            continue
        parts = torch.split(rooms[rank], [math.prod(shape) for shape in shapes[rank]])
        arrived.append([part.view(tuple(shape)) for part, shape in zip(parts, shapes[rank], strict=True)])
    return arrived
