"""PipeDream-2BW (arXiv:2006.09503, section 3.1): 1F1B that is not drained between steps, with two versions of weights.

    3 stages, 3 micro-batches a step, B = 2 F, three steps; step 0 is micro-batches 0 to 2, step 1 is 3 to 5

    rank 0  0>1>2>........0<<<3>1<<<4>2<<<5>3<<<6>4<<<7>5<<<8>6<<<..7<<<..8<<<
    rank 1  ..0>1>....0<<<2>1<<<3>2<<<4>3<<<5>4<<<6>5<<<7>6<<<8>7<<<..8<<<....
    rank 2  ....0>0<<<1>1<<<2>2<<<3>3<<<4>4<<<5>5<<<6>6<<<7>7<<<8>8<<<........

The *window* of step t is what a rank does from behind the last backward of step t-1 to the last backward of step t. On
stage s of p it ends with the p-s-1 first forwards of step t+1 among the last backwards of step t:

    stage 0 of 3,     first    0F0 0F1 0F2 0B0 0F3 0B1 0F4 0B2 0F5 0B3    a step's micro-batches are 0 to m-1,
    4 a step          steady           0F6 0B4 0F7 0B5 0F0 0B6 0F1 0B7    in every second step m to 2m-1
                      last             0F2 0B0 0F3 0B1     0B2     0B3

All of step t, forward and backward, is computed with the weights W(t-1), and W(t+1) = W(t) - rate * gradient(W(t-1);
step t): the gradient is one step late, on every stage alike. In window t a rank needs W(t-1), and W(t) for the forwards
of step t+1; W(t+1) takes the place of W(t-1). That is two versions for any p, if a step has m >= p micro-batches.

Bubble over T steps: (p-1) / (T m + p - 1), which tends to 0. Kept on stage s: the activations of p-s micro-batches, as
in 1F1B, two versions of the weights, and two steps' gradients. Traffic of a step is 1F1B's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardwise.errors import ScheduleError
from shardwise.schedule import one_f_one_b
from shardwise.schedule.about import About
from shardwise.schedule.actions import Action, Kind, StageAction, Transfer, TransferKind
from shardwise.schedule.graph import Edges, checked
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.transfers import DEFAULT_PREFETCH, Row, with_transfers

__all__ = ["ABOUT", "NAME", "Windows", "check_micro_batches", "generate", "unrolled", "windows"]

NAME = "pipedream-2bw"
ABOUT = About(
    title="PipeDream-2BW",
    source="arXiv:2006.09503, section 3.1; gradients are one step late, for m >= p",
    bubble="(p-1)(t_F + t_B) in all steps together, none in one more step",
    memory="p - r on rank r, two versions of the weights, two steps' gradients",
    traffic="2 m (p - 1) messages",
)
_STEPS = 4  # enough to see a first, two steady and a last window


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What every rank does in a step, transfers included: rows[r] of four kinds of windows, all of steps in slot 0.

    first: begins with nothing under way; steady: the step's first forwards have been run in the window before; a
    window that is `last` as well leaves nothing under way. Micro-batches of a step are numbered from 0, those of the
    next one from `num_micro_batches`.
    """

    num_micro_batches: int
    first: tuple[Row, ...]
    steady: tuple[Row, ...]
    last: tuple[Row, ...]
    only: tuple[Row, ...]  # first and last

    def row(self, rank: int, *, first: bool, last: bool, slot: int = 0) -> Row:
        """The window of one rank; in slot 1 the step's micro-batches are those from `num_micro_batches` up."""
        rows = (self.only if last else self.first) if first else (self.last if last else self.steady)
        return rows[rank] if slot == 0 else _shifted(rows[rank], self.num_micro_batches, self.num_micro_batches)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 1) -> Schedule:
    """One step by itself, first and last at once: what 1F1B does, for any number of micro-batches.

    Raises ScheduleError if a count is below 1.
    """
    return replace(one_f_one_b.generate(num_ranks=num_ranks, num_micro_batches=num_micro_batches), name=NAME)


def unrolled(*, num_ranks: int, num_micro_batches: int, num_steps: int) -> Schedule:
    """`num_steps` steps that are not drained in between, one stage a rank.

    Step t has the micro-batches from t * num_micro_batches. Raises ScheduleError if a count is below 1, or steps have
    fewer micro-batches than there are ranks.
    """
    check_micro_batches(num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    return generate(num_ranks=num_ranks, num_micro_batches=num_micro_batches * num_steps)


def check_micro_batches(*, num_ranks: int, num_micro_batches: int) -> None:
    """Two versions of weights are enough (section 3.1: m >= d). Raises ScheduleError."""
    if num_micro_batches < num_ranks:
        raise ScheduleError(
            f"{NAME} keeps two versions of the weights, which needs as many micro-batches a step as stages, but there "
            f"are {num_micro_batches} for {num_ranks} stages; use {num_ranks} micro-batches or more, or 1f1b"
        )


def windows(
    *, num_ranks: int, num_micro_batches: int, edges: Edges | None = None, prefetch: int = DEFAULT_PREFETCH
) -> Windows:
    """The windows of all ranks on a stage graph, the chain if not given.

    Receives of a window's end may be posted for the next window. Raises ScheduleError as `unrolled` does, or if
    `prefetch` reaches further than the step after.
    """
    edges = checked(edges, num_ranks)
    several = unrolled(num_ranks=num_ranks, num_micro_batches=num_micro_batches, num_steps=_STEPS)
    alone = unrolled(num_ranks=num_ranks, num_micro_batches=num_micro_batches, num_steps=1)
    cut = [tuple(_windows_of(row, num_micro_batches)) for row in with_transfers(several, edges, prefetch=prefetch)]
    first, _, steady, last = zip(*cut, strict=True)
    return Windows(
        num_micro_batches=num_micro_batches,
        first=first,
        steady=steady,
        last=tuple(_shifted(row, num_micro_batches, num_micro_batches) for row in last),
        only=with_transfers(alone, edges, prefetch=prefetch),
    )


def _windows_of(row: Row, num_micro_batches: int) -> Iterator[Row]:
    """Cut behind the last backward of every step, and what is sent of it; micro-batches are those of two steps."""
    stage, start = _stage(row), 0
    for t in range(_STEPS):
        end = _end(row, Action(kind=Kind.B, stage=stage, micro_batch=num_micro_batches * (t + 1) - 1))
        window = row[start:end]
        latest = max(item.micro_batch for item in window if not isinstance(item, StageAction)) // num_micro_batches
        if latest > t + 1:
            raise ScheduleError(
                f"a window knows its own step and the next one, but the receives of step {t + 2} would be posted in "
                f"that of step {t}; lower prefetch"
            )
        yield _shifted(window, 0, num_micro_batches)
        start = end


def _stage(row: Row) -> int:
    return next(item.stage for item in row if isinstance(item, Action))


def _end(row: Row, last: Action) -> int:
    """Behind `last` and the transfers of what it has made."""
    end = row.index(last) + 1
    while end < len(row) and isinstance(item := row[end], Transfer) and item.kind is TransferKind.SEND:
        end += 1
    return end


def _shifted(row: Row, by: int, num_micro_batches: int) -> Row:
    """The row with micro-batches numbered `by` further, within the numbers of two steps."""
    numbers = 2 * num_micro_batches
    return tuple(
        item if isinstance(item, StageAction) else replace(item, micro_batch=(item.micro_batch + by) % numbers)
        for item in row
    )
