"""What is left on a rank, and what it sends, where replicas divide the state of training (ZeRO, FSDP).

    zero=1   optimizer / n        zero=2   and gradients / n        zero=3   and parameters / n
             all whole                     whole for a bucket                whole for a bucket, or for a step

Bytes of Rajbhandari et al. 2020 (arXiv:1910.02054, section 5), with what `parallel.sharded` keeps whole meanwhile: the
bucket that computes and the next one. Arithmetic on an estimate's numbers; knows no tensors.
"""

from __future__ import annotations

import dataclasses

from shardwise.layout import Layout

__all__ = ["StateBytes", "divided", "sent_bytes"]

_AT_ONCE = 2  # buckets that are whole


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Of one rank."""

    parameters: int
    gradients: int
    optimizer: int


def divided(layout: Layout, whole: StateBytes, *, largest: int) -> StateBytes:
    """What of `whole` is on one of the layout's ranks at most; `largest`: bytes of the largest unit's parameters.

    Parts are rounded up; padding is left out.
    """
    if layout.fsdp == 1:
        return whole
    by_step = layout.unshards_by_step
    parameters, gradients = whole.parameters, whole.gradients
    turn = min(_AT_ONCE * largest, whole.parameters)
    if layout.zero >= 2 and not by_step:
        gradients = _part(gradients, layout) + min(turn, whole.gradients)
    if layout.zero == 3:
        parameters = _part(parameters, layout) + (whole.parameters if by_step else turn)
    return StateBytes(parameters=parameters, gradients=gradients, optimizer=_part(whole.optimizer, layout))


def sent_bytes(layout: Layout, *, parameters: int, gradients: int, num_micro_batches: int) -> int:
    """What each rank sends in a step to gather `parameters` and to average `gradients`, by rings (Patarasuk and Yuan
    2009): (n - 1) / n of what is gathered or scattered, twice that of what is summed."""
    n, outer = layout.fsdp, layout.num_replicas // layout.fsdp
    if n == 1:
        return 2 * (outer - 1) * gradients // outer
    by_step = layout.unshards_by_step
    scattered = gradients * (num_micro_batches if layout.zero >= 2 and not by_step else 1)
    once = layout.zero < 3 or by_step
    gathered = parameters * (1 if once else 2 * num_micro_batches)  # for the forward and for the backward of each
    return (n - 1) * (scattered + gathered) // n + 2 * (outer - 1) * gradients // (outer * n)


def _part(nbytes: int, layout: Layout) -> int:
    return -(-nbytes // layout.fsdp)
