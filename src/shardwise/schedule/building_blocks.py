"""V-shaped schedules out of building blocks (arXiv:2405.15362, section 3): one micro-batch's way, repeated.

The *block* says when one micro-batch is where; with F = I = W = 1 the next one follows 6 later, since a rank has six
things to do for each. It is given by two steps: how long after its neighbour a rank runs on the way down the ranks
(`down`: forward of the first stage, input gradient of the second) and on the way up (`up`: the other two).

    p = 3, down 1, up 2     rank 0  F0 .  .  .  .  .  .  F1 I1 .  .  .  .  .  .  I0
                            rank 1  .  F0 .  .  .  F1 .  .  .  I1 .  .  .  I0 .  .
                            rank 2  .  .  F0 F1 .  .  .  .  .  .  I1 I0 .  .  .  .

How long what a forward kept must live, divided by 6, is what a rank keeps: small steps need little memory and leave a
bubble, since not all of a rank's six slots can be filled; large ones the reverse.

Then the blocks are squeezed: every rank runs its forwards in the order of the blocks and its input gradients in theirs,
each as soon as it can, no forward beyond `capacity` stage activations, weight gradients where nothing else can run.
This cannot deadlock if the blocks themselves stay within the capacity: the earliest item in block time that has not
been run has its inputs, and whatever kept memory in the block then has freed it here too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule

__all__ = ["squeezed_v"]

_PERIOD = 6
Timed = tuple[int, int, int]  # (block time, micro-batch, stage)


@dataclass(kw_only=True, slots=True)
class _Rank:
    forwards: deque[Timed]
    backwards: deque[Timed]
    weights: deque[tuple[int, int]] = field(default_factory=deque)  # (stage, micro-batch)
    num_kept: int = 0
    row: list[Action] = field(default_factory=list)


def squeezed_v(
    name: str, *, num_ranks: int, num_micro_batches: int, down: int, up: int, delay: int, capacity: int
) -> Schedule:
    """The schedule of two stages a rank in a V whose blocks have these steps; its backward starts `delay` later."""
    ranks = stages_of_ranks(Placement.V, num_ranks=num_ranks, chunks=2)
    forward_at, backward_at = _block(num_ranks, down, up, delay)
    num_stages, micro_batches = 2 * num_ranks, range(num_micro_batches)

    def timed(block: Callable[[int], int], stages: tuple[int, ...]) -> deque[Timed]:
        return deque(sorted((_PERIOD * m + block(s), m, s) for s in stages for m in micro_batches))

    states = [_Rank(forwards=timed(forward_at, own), backwards=timed(backward_at, own)) for own in ranks]
    _squeeze(states, num_stages=num_stages, num_micro_batches=num_micro_batches, capacity=capacity)
    return Schedule(
        name=name,
        num_stages=num_stages,
        num_micro_batches=num_micro_batches,
        ranks=ranks,
        actions=tuple(tuple(state.row) for state in states),
    )


def _block(num_ranks: int, down: int, up: int, delay: int) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """When a stage runs the forward and the input gradient of micro-batch 0."""
    last = num_ranks - 1
    turn = last * down + 1  # the second half of the forward starts on the last rank
    back = turn + last * up + 1 + delay  # and the backward on the first one
    turn_back = back + last * down + 1

    def forward_at(s: int) -> int:
        return s * down if s <= last else turn + (s - num_ranks) * up

    def backward_at(s: int) -> int:
        return back + (2 * num_ranks - 1 - s) * down if s > last else turn_back + (last - s) * up

    return forward_at, backward_at


def _squeeze(states: list[_Rank], *, num_stages: int, num_micro_batches: int, capacity: int) -> None:
    """Fills the rows, one slot of time after another; every action takes one."""
    never = 1 << 62
    forward_end = [[never] * num_micro_batches for _ in range(num_stages)]
    backward_end = [[never] * num_micro_batches for _ in range(num_stages)]
    num_left, now = 3 * num_stages * num_micro_batches, 0
    while num_left:
        for state in states:
            item = _next(state, now, forward_end, backward_end, capacity)
            if item is None:
                continue
            kind, s, m = item
            state.row.append(Action(kind=kind, stage=s, micro_batch=m))
            num_left -= 1
            if kind is Kind.F:
                forward_end[s][m] = now + 1
            elif kind is Kind.I:
                backward_end[s][m] = now + 1
        now += 1


def _next(
    state: _Rank, now: int, forward_end: list[list[int]], backward_end: list[list[int]], capacity: int
) -> tuple[Kind, int, int] | None:
    """What a rank runs now: of what can run, the earlier one of the blocks; else a weight gradient; else nothing."""
    found: tuple[Timed, Kind] | None = None
    if state.backwards:
        _, m, s = state.backwards[0]
        above = s + 1 == len(backward_end) or backward_end[s + 1][m] <= now
        if above and forward_end[s][m] <= now:
            found = state.backwards[0], Kind.I
    if state.forwards and state.num_kept < capacity and (found is None or state.forwards[0] < found[0]):
        _, m, s = state.forwards[0]
        if s == 0 or forward_end[s - 1][m] <= now:
            found = state.forwards[0], Kind.F
    if found is None:
        if not state.weights:
            return None
        state.num_kept -= 1
        return Kind.W, *state.weights.popleft()
    (_, m, s), kind = found
    if kind is Kind.F:
        state.forwards.popleft()
        state.num_kept += 1
    else:
        state.backwards.popleft()
        state.weights.append((s, m))
    return kind, s, m
