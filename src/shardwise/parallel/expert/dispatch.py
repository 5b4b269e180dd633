"""Rows that travel to the rank of their expert and back, as differentiable functions. Knows no modules.

                forward                              backward
    send_to     rows to the ranks of their experts   gradients back to where the rows came from
    bring_back  results to where the rows came from  gradients to the ranks of the experts

Every exchange has its backward on every rank, in the reverse order, also where a rank has nothing to send: each is
tied to the next by an empty tensor (an anchor) that asks for a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwise.parallel.expert.groups import ExpertGroup

__all__ = ["after", "anchor", "bring_back", "send_to"]


def anchor(*read: torch.Tensor) -> torch.Tensor:
    """An empty tensor to begin a row of exchanges with. It asks for a gradient where one of those that are `read` does,
    which is so on all ranks or on none."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read)
    return torch.empty(0, device=read[0].device, requires_grad=wanted)


def send_to(
    tensors: Sequence[torch.Tensor],
    tie: torch.Tensor,
    group: ExpertGroup,
    sent: Sequence[int],
    received: Sequence[int],
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Each of `tensors` (rows, width) to other ranks, in one message: what arrived of each, and the next tie.

    Floating ones have gradients.
    """
    *arrived, tie = _Send.apply(tie, group, tuple(sent), tuple(received), *tensors)  # type: ignore[no-untyped-call]
    return tuple(arrived), tie


def bring_back(
    rows: torch.Tensor, tie: torch.Tensor, group: ExpertGroup, sent: Sequence[int], received: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` (rows, width) to other ranks, with the tie of the exchange they answer: what arrived, the next tie."""
    (arrived,), tie = send_to([rows], tie, group, sent, received)
    return arrived, tie


def after(value: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
    """`value`, whose backward begins the backwards of all exchanges before `tie`."""
    return _After.apply(value, tie)  # type: ignore[no-any-return, no-untyped-call]


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tie: torch.Tensor,
        group: ExpertGroup,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        *tensors: torch.Tensor,
    ) -> Any:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        ctx.floating = [tensor.is_floating_point() for tensor in tensors]
        got = _exchanged(tensors, group, sent, received)
        ctx.mark_non_differentiable(*[tensor for tensor in got if not tensor.is_floating_point()])
        return (*got, tie.new_empty(0))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        given = [each for each, floating in zip(gradients, ctx.floating, strict=False) if floating]
        back = iter(_exchanged(given, ctx.group, ctx.received, ctx.sent))
        of_tensors = [next(back) if floating else None for floating in ctx.floating]
        return gradients[-1], None, None, None, *of_tensors


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tie)  # a checkpoint computes again as far as tensors were saved: all exchanges
        alias = value.new_empty(0)
        alias.set_(value.detach())  # type: ignore[call-overload]
        return alias  # no view: what reads it may write into it

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (tie,) = ctx.saved_tensors  # and does so here on all ranks, before the first exchange of the backward
        return gradients[0], tie.new_zeros(0)


def _exchanged(
    tensors: Sequence[torch.Tensor], group: ExpertGroup, sent: Sequence[int], received: Sequence[int]
) -> list[torch.Tensor]:
    """Tensors (rows, width) with as many rows each, packed into one message row by row."""
    if len(tensors) == 1:
        return [group.rows(tensors[0].contiguous(), sent, received)]
    widths = [tensor.shape[1] * tensor.element_size() for tensor in tensors]
    packed = torch.cat([_bytes(tensor, width) for tensor, width in zip(tensors, widths, strict=True)], dim=1)
    got = group.rows(packed, sent, received)
    parts = got.split(widths, dim=1)  # type: ignore[no-untyped-call]
    return [
        part.clone(memory_format=torch.contiguous_format).view(tensor.dtype).view(got.shape[0], tensor.shape[1])
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _bytes(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).view(tensor.shape[0], width)
