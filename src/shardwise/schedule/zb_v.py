"""ZB-V (arXiv:2401.10241, section 6; V-ZB of arXiv:2405.15362): two stages a rank in a V, no bubble in 1F1B's memory.

    3 ranks, 2 stages each, 6 micro-batches, F = I = W

    rank 0  0>1>2>3>4>0)0(0-1)1(1-2)2(2-5>0<0=3)3(3-1<1=4)4(4-2<2=5)5(5-3<3=4<4=5<5=....
    rank 1  ..0>1>2>0)3>1)0(0-2)1(1-4>0<0=3)2(2-5>1<1=4)3(3-2<2=5)4(4-3<5(4<3=5<4=5-5=..
    rank 2  ....0>0)1>1)2>2)0(0-3>0<0=3)1(1-4>1<1=4)2(2-5>2<2=5)3(3-3<4(4<5(5<3=4-5-4=5=

The loss is on rank 0, where the first stage is as well: a micro-batch's second half starts where its first half ends,
so its activations are freed sooner than in a loop. Every rank keeps at most 2 p stage activations: p micro-batches of
its share of the model, as rank 0 in 1F1B. With F = I = W no rank waits between its first and its last action, from
m = 2 p - 1 on; with less those that are missing leave their place empty, and for m <= p the blocks of `building_blocks`
are squeezed into the same memory. If t_F, t_I and t_W differ, the bubble grows with the differences.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardwise.schedule.about import About
from shardwise.schedule.actions import Kind
from shardwise.schedule.building_blocks import squeezed_v
from shardwise.schedule.order import Visit, actions, check_counts
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="ZB-V",
    source="arXiv:2401.10241, section 6; arXiv:2405.15362, table 1 (V-ZB)",
    bubble="0 between a rank's first and last action, if t_F = t_I = t_W",
    memory="p on every rank",
    traffic="4 m (p - 1) messages, twice as many as 1F1B",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 2) -> Schedule:
    """The ZB-V schedule, two stages a rank. Raises ScheduleError if a count is below 1."""
    check_counts(num_ranks, num_micro_batches)
    p, m = num_ranks, num_micro_batches
    if m <= p:
        return squeezed_v("zb-v", num_ranks=p, num_micro_batches=m, down=2, up=4, delay=0, capacity=2 * p)
    ranks = stages_of_ranks(Placement.V, num_ranks=p, chunks=2)
    return Schedule(
        name="zb-v",
        num_stages=2 * p,
        num_micro_batches=m,
        ranks=ranks,
        actions=tuple(
            actions(((kind, (stages[half], k)) for kind, (half, k) in _order(p, r, max(m, 2 * p - 1))), m)
            for r, stages in enumerate(ranks)
        ),
    )


def _order(num_ranks: int, rank: int, num_micro_batches: int) -> Iterator[tuple[Kind, Visit]]:
    """What a rank does, its two stages called 0 and 1."""
    p, r, m = num_ranks, rank, num_micro_batches
    first = 2 * (p - r) - 1  # forwards of stage 0 until the first one is back in stage 1
    yield from ((Kind.F, (0, k)) for k in range(first))
    for k in range(r):
        yield Kind.F, (1, k)
        yield Kind.F, (0, first + k)
    for k in range(p - r):
        yield Kind.F, (1, r + k)
        yield Kind.I, (1, k)
        yield Kind.W, (1, k)
    for k in range(m - p):  # steady: all of stage 0, all of stage 1
        if 2 * p - r - 1 + k < m:
            yield Kind.F, (0, 2 * p - r - 1 + k)
        yield from ((kind, (0, k)) for kind in (Kind.I, Kind.W))
        yield Kind.F, (1, p + k)
        yield from ((kind, (1, p - r + k)) for kind in (Kind.I, Kind.W))
    for k in range(r):
        yield Kind.I, (0, m - p + k)
        yield Kind.I, (1, m - r + k)
    for k in range(p - r):
        yield Kind.I, (0, m - p + r + k)
        yield Kind.W, (0, m - p + k)
    yield from ((Kind.W, (1, m - r + k)) for k in range(r))
    yield from ((Kind.W, (0, m - r + k)) for k in range(r))
