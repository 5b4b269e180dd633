"""Schedules without a formula, for any number of places: simulated for few places and equal stages, and stretched.

What a pipeline takes beyond the pace of its ranks (its fill) and how many micro-batches each stage keeps grow with the
number of places; both are measured on a small pipeline of the same schedule, once for stages of about the same
proportions, and scaled. Tests hold them to the simulator. Refuses to know what a stage does.

    T(p, m) = m · pace + fill(p),    fill(p) = fill(8) + (fill(8) - fill(4)) (p - 8) / 4  where p > 8
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from shardwise.plan.in_flight import kept_micro_batches
from shardwise.plan.stage_work import StageWork
from shardwise.schedule import Costs, Kind, generate, placement, seconds_of

__all__ = ["alive_of", "fill_of"]

_SMALL = 8  # places, at most, that are simulated
_STEPS = 20  # proportions are told apart by a twentieth, where a pipeline is stretched
_FINE = 500  # where it is not


def fill_of(
    schedule: str,
    *,
    num_ranks: int,
    chunks: int,
    num_micro_batches: int,
    forward: float,
    weight: float,
    send: float,
) -> float:
    """What a step takes beyond `num_micro_batches` times the seconds of a rank's stages, in those seconds.

    forward, weight: the shares of a micro-batch's seconds that are forward, and gradients of weights; send: of one
    message, over the seconds of one stage.
    """
    steps = _STEPS if num_ranks > _SMALL else _FINE
    shares = [round(n * steps) / steps for n in (forward, weight, send)]
    fills = [
        _simulated(schedule, ranks, chunks, _few(num_micro_batches, num_ranks, ranks, chunks), *shares)
        for ranks in _sizes(num_ranks)
    ]
    return _continued(fills, num_ranks)


def alive_of(
    schedule: str, *, num_ranks: int, chunks: int, num_micro_batches: int, waiting: float
) -> tuple[float, ...]:
    """[s]: micro-batches that stage s keeps when its rank keeps the most. waiting: the share of what a stage keeps that
    gradients of weights alone need."""
    kept = [
        _alive(schedule, ranks, chunks, _few(num_micro_batches, num_ranks, ranks, chunks), round(waiting * _STEPS))
        for ranks in _sizes(num_ranks)
    ]
    small = kept[-1]
    if len(kept) == 1:
        return small
    fullest = [
        max(sum(stages[stage] for stage in own) for own in placement(schedule, num_ranks=ranks, chunks=chunks))
        for ranks, stages in zip(_sizes(num_ranks), kept, strict=True)
    ]
    stretch = _continued(fullest, num_ranks) / fullest[-1]
    near = [place * _SMALL // num_ranks for place in range(num_ranks)]  # as far down its chunk
    return tuple(
        min(float(num_micro_batches), small[chunk * _SMALL + place] * stretch)
        for chunk in range(chunks)
        for place in near
    )


def _sizes(num_ranks: int) -> tuple[int, ...]:
    """Places of the pipelines that are simulated."""
    return (num_ranks,) if num_ranks <= _SMALL else (_SMALL // 2, _SMALL)


def _continued(small: Sequence[float], num_ranks: int) -> float:
    """On a straight line through the two of `_sizes`."""
    if len(small) == 1:
        return small[0]
    half, whole = small
    return whole + (whole - half) * (num_ranks - _SMALL) / (_SMALL - _SMALL // 2)


def _few(num_micro_batches: int, num_ranks: int, ranks: int, chunks: int) -> int:
    """Micro-batches of the small pipeline: as many turns as there are, or enough that one more adds a pace."""
    enough = 2 * ranks * chunks
    own = num_micro_batches if ranks == num_ranks else max(1, round(num_micro_batches * ranks / num_ranks))
    return min(own, enough)


@functools.lru_cache(maxsize=4096)
def _alive(schedule: str, ranks: int, chunks: int, count: int, waiting: int) -> tuple[float, ...]:
    made = generate(schedule, num_ranks=ranks, num_micro_batches=count, chunks=chunks)
    equal = [
        StageWork(stage=stage, parameters=0, trained=0, kernels=(), saved_bytes=1.0, weight_bytes=waiting / _STEPS)
        for stage in range(ranks * chunks)
    ]
    return kept_micro_batches(made, equal)


@functools.lru_cache(maxsize=4096)
def _simulated(schedule: str, ranks: int, chunks: int, count: int, forward: float, weight: float, send: float) -> float:
    """The fill of a small pipeline of equal stages, whose ranks take a second for a micro-batch."""
    num_stages = ranks * chunks
    one = 1.0 / chunks
    f, w = forward * one, weight * one
    i = max(0.0, one - f - w)
    message = send * one
    pairs = [(stage, stage + 1) for stage in range(num_stages - 1)]
    costs = Costs(
        compute_seconds={
            Kind.F: (f,) * num_stages,
            Kind.B: (i + w,) * num_stages,
            Kind.I: (i,) * num_stages,
            Kind.W: (w,) * num_stages,
        },
        activation_seconds=dict.fromkeys(pairs, message),
        gradient_seconds=dict.fromkeys(pairs, message),
    )
    made = generate(schedule, num_ranks=ranks, num_micro_batches=count, chunks=chunks)
    return seconds_of(made, costs) - count
