"""Ring attention: keys and values travel from rank to rank, queries stay (Liu et al. 2023, arXiv:2310.01889).

    forward    step 0   1   2   3             backward: k and v travel again, their gradients behind them
    rank 0   k,v of 0   3   2   1             d(k, v) of 0:  made on 1, added to on 2 and 3, then home to 0
    rank 1          1   0   3   2
    rank 2          2   1   0   3             What a causal mask hides is not computed, and keys travel no further
    rank 3          3   2   1   0             than the last rank that sees them.

Memory is that of own tokens: two more keys and values, and the scores of no block are kept. Knows tensors and the ranks
of one group; no modules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shardwise.errors import ModelError
from shardwise.parallel.context.blocks import Extras, Joined, attend, attend_backward, compute_dtype, is_fused
from shardwise.parallel.context.links import Links, as_autocast, check_tokens, four_dims, whole_keep
from shardwise.parallel.context.masks import Block, Mask, cut_rows
from shardwise.parallel.context.placement import Placement
from shardwise.parallel.context.route import Route
from shardwise.parallel.context.travelling import Travelling

__all__ = ["ring_attention"]

_MOST_SCORES = 1 << 26  # that are alive at once where attention is written out: 256 MiB of float32


def ring_attention(
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

    `tokens` says where queries are, `keys` where keys and values are if not there too; on one context, every rank has
    them whole. `mask` is whole: it broadcasts to (samples, heads, queries, keys). Key heads divide query heads.
    Gradients of q, k and v are those of own tokens; of a mask that wants one, and of whole keys, this rank's share:
    the ranks' shares sum to the whole. With dropout, all weights' mask is drawn at once, and own rows are kept.
    Collective. Raises ModelError for masks and heads that do not fit, DataflowError for tokens of others.
    """
    keys = tokens if keys is None else keys
    q, k, v = as_autocast(q, k, v)
    check_tokens(q, k, v, tokens, keys, group)
    if is_causal and mask is not None:
        raise ModelError("attention takes a mask or is_causal, not both; let the mask hide what is_causal would")
    keep = whole_keep(q.shape[0], q.shape[1], tokens.size, keys.size, dropout_p=dropout_p, like=q)
    ring = _Ring(
        group=group,
        route=Route(rank=group.rank, queries=tokens, keys=keys, is_causal=is_causal),
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        kept_weight=0.0 if dropout_p == 1 else 1 / (1 - dropout_p),
    )
    own_keep = None if keep is None else tokens.own(keep, -2, group.rank).clone()  # the whole is not kept for it
    whole_mask = four_dims(mask, q.shape[0], q.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        return _RingAttention.apply(q, k, v, whole_mask, own_keep, ring)  # type: ignore[no-any-return, no-untyped-call]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Ring:
    """What is the same for all blocks of one attention."""

    group: Links
    route: Route
    scale: float
    kept_weight: float


class _Given:
    """What decides the blocks of one rank."""

    def __init__(
        self, ring: _Ring, tensors: Sequence[torch.Tensor], mask: torch.Tensor | None, keep: torch.Tensor | None
    ) -> None:
        """`tensors` are this rank's q, k and v."""
        q, k, v = tensors
        self._ring = ring
        self.mask = None if mask is None else Mask(mask.detach(), ring.route.queries, ring.route.keys)
        self._all = Extras(
            scale=ring.scale,
            shift=None if self.mask is None else self.mask.swallowed(ring.group.rank),
            keep=keep,
            kept_weight=ring.kept_weight,
            wants_mask_gradient=mask is not None and mask.requires_grad,
        )
        self._causal = dataclasses.replace(self._all, causal=True)
        self._heads = q.shape[0] * q.shape[1] if k.shape[1] else 0  # of all samples
        self._keeps_scores = not is_fused(q, k, v, self._all)

    def blocks(self, source: int) -> Iterator[tuple[Block, Extras]]:
        """What is to be computed with `source`'s keys."""
        route = self._ring.route
        if not self._heads:
            return
        scores_of_row = max(1, self._heads * route.keys.num(source))
        most = max(1, _MOST_SCORES // scores_of_row) if self._keeps_scores else route.queries.size
        for whole in route.blocks(source):
            for block in cut_rows(whole, most):
                extras = self._extras(block, source).seen()
                if extras is not None:
                    yield block, extras

    def _extras(self, block: Block, source: int) -> Extras:
        ring, shift, keep = self._ring, self._all.shift, self._all.keep
        if shift is None and keep is None and self.mask is None:
            return self._causal if block.causal else self._all
        if shift is not None and shift.shape[-2] > 1:
            shift = shift[..., slice(*block.rows), :]
        if keep is not None:
            keep = ring.route.keys.own(keep[..., slice(*block.rows), :], -1, source)[..., slice(*block.columns)]
        mask = None if self.mask is None else self.mask.part(ring.group.rank, source, block)
        return dataclasses.replace(self._all, causal=block.causal, mask=mask, shift=shift, keep=keep)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        keep: torch.Tensor | None,
        ring: _Ring,
    ) -> torch.Tensor:
        given = _Given(ring, (q, k, v), mask, keep)
        joined = Joined(q, v.shape[-1])
        travelling = Travelling(ring.group, ring.route, k, v)
        for turn, source in enumerate(ring.route.sources):
            keys, values = travelling.take(turn)
            for block, extras in given.blocks(source):
                columns = slice(*block.columns)
                own = q[..., slice(*block.rows), :]
                joined.add(block.rows, *attend(own, keys[..., columns, :], values[..., columns, :], extras))
        travelling.finish()
        out, lse = joined.answer(q.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, mask, keep, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        q, k, v, mask, keep, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        given = _Given(ring, (q, k, v), mask, keep)
        dtype = compute_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        of_mask = None
        if mask is not None and ctx.needs_input_grad[3]:
            of_mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        own: list[torch.Tensor] = []
        travelling = Travelling(ring.group, ring.route, k, v)
        for turn, source in enumerate(ring.route.sources):
            arriving = travelling.gradients_of(source, dtype)  # asked for in the order in which it is sent
            keys, values = travelling.take(turn)
            dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (keys, values))
            for block, extras in given.blocks(source):
                rows, columns = slice(*block.rows), slice(*block.columns)
                parts = attend_backward(
                    gradient[..., rows, :], q[..., rows, :], keys[..., columns, :], values[..., columns, :],
                    out[..., rows, :], lse[..., rows], extras,
                )  # fmt: skip
                dq[..., rows, :].add_(parts[0])  # not +=, which writes what it has added to a second time
                dk[..., columns, :].add_(parts[1])
                dv[..., columns, :].add_(parts[2])
                if of_mask is not None and parts[3] is not None and given.mask is not None:
                    given.mask.add_gradient(of_mask, parts[3], ring.group.rank, source, block)
            if source == ring.route.own:
                own = [dk, dv]
            else:
                travelling.hand_on(source, dk, dv, arriving)
        travelling.bring_home(*own)
        travelling.finish()
        dk, dv = own
        of_mask = None if of_mask is None else of_mask.to(mask.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), of_mask, None, None
