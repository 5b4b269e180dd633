"""Orders of work that several generators share. It knows neither time nor what a stage costs.

A *visit* is one micro-batch in one stage. Interleaved schedules visit a rank's stages in rounds of g micro-batches,
here two stages (0 and 4) and g = 4:

    forward    0,0 0,1 0,2 0,3   4,0 4,1 4,2 4,3   0,4 0,5 0,6 0,7   4,4 4,5 4,6 4,7       (stage, micro-batch)
    backward   4,0 4,1 4,2 4,3   0,0 0,1 0,2 0,3   4,4 ...

Where the micro-batches do not fill the last round, the visits that are missing leave their place empty: what is left of
an order that cannot deadlock cannot deadlock either, since micro-batches do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind

__all__ = ["Visit", "actions", "check_counts", "in_rounds", "round_size", "split_backwards", "whole_backwards"]

Visit = tuple[int, int]  # (stage, micro-batch)


def check_counts(num_ranks: int, num_micro_batches: int) -> None:
    """Raises ScheduleError if there is no rank or no micro-batch."""
    if num_ranks < 1 or num_micro_batches < 1:
        raise ScheduleError(
            f"a schedule has at least 1 stage and 1 micro-batch, but got {num_ranks} ranks and {num_micro_batches} "
            "micro-batches; raise the one that is 0"
        )


def round_size(num_ranks: int, num_micro_batches: int) -> int:
    """Micro-batches of a round: at least as many as ranks, so that none waits for the first to come round again."""
    num_rounds = max(1, num_micro_batches // num_ranks)
    return -(-num_micro_batches // num_rounds)


def in_rounds(stages: Sequence[int], num_micro_batches: int, size: int) -> list[Visit]:
    """Visits of `stages`, in this order, in rounds of `size` micro-batches; the last round is filled up beyond them."""
    return [
        (stage, m)
        for first in range(0, num_micro_batches, size)
        for stage in stages
        for m in range(first, first + size)
    ]


def whole_backwards(
    forwards: Sequence[Visit], backwards: Sequence[Visit], *, num_warmup: int, num_micro_batches: int
) -> tuple[Action, ...]:
    """1F1B over visits: `num_warmup` forwards, then a forward and a backward in turn, then the other backwards."""
    num_warmup = min(num_warmup, len(forwards))

    def order() -> Iterator[tuple[Kind, Visit]]:
        yield from ((Kind.F, visit) for visit in forwards[:num_warmup])
        for k, backward in enumerate(backwards):
            if num_warmup + k < len(forwards):
                yield Kind.F, forwards[num_warmup + k]
            yield Kind.B, backward

    return actions(order(), num_micro_batches)


def split_backwards(
    forwards: Sequence[Visit], backwards: Sequence[Visit], *, num_warmup: int, num_behind: int, num_micro_batches: int
) -> tuple[Action, ...]:
    """`num_warmup` forwards, then I, W and F in turn, each W `num_behind` visits behind its I; then what is left."""
    num_warmup = min(num_warmup, len(forwards))

    def order() -> Iterator[tuple[Kind, Visit]]:
        yield from ((Kind.F, visit) for visit in forwards[:num_warmup])
        for k, backward in enumerate(backwards):
            yield Kind.I, backward
            if k >= num_behind:
                yield Kind.W, backwards[k - num_behind]
            if num_warmup + k < len(forwards):
                yield Kind.F, forwards[num_warmup + k]
        yield from ((Kind.W, visit) for visit in backwards[max(0, len(backwards) - num_behind) :])

    return actions(order(), num_micro_batches)


def actions(order: Iterable[tuple[Kind, Visit]], num_micro_batches: int) -> tuple[Action, ...]:
    """The actions of the visits that there are."""
    return tuple(Action(kind=kind, stage=stage, micro_batch=m) for kind, (stage, m) in order if m < num_micro_batches)
