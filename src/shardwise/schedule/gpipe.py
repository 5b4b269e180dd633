"""GPipe (arXiv:1811.06965): all forwards, then all backwards.

    4 stages, 4 micro-batches, B = 2 F; a bubble of (p-1)/(m+p-1), and all m micro-batches in flight

    rank 0  0>1>2>3>..................0<<<1<<<2<<<3<<<
    rank 1  ..0>1>2>3>............0<<<1<<<2<<<3<<<....
    rank 2  ....0>1>2>3>......0<<<1<<<2<<<3<<<........
    rank 3  ......0>1>2>3>0<<<1<<<2<<<3<<<............

The paper runs the backwards in reverse. Here they ascend, as in every other schedule and on one device, so
that gradients are accumulated in the same order and can be compared bit by bit.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="GPipe",
    source="arXiv:1811.06965, section 2.3",
    bubble="(p-1)(t_F + t_B)",
    memory="m",
    traffic="2 m (p - 1) messages",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 1) -> Schedule:
    """The GPipe schedule, one stage a rank. Raises ScheduleError if a count is below 1."""
    return Schedule(
        name="gpipe",
        num_stages=num_ranks,
        num_micro_batches=num_micro_batches,
        ranks=tuple((s,) for s in range(num_ranks)),
        actions=tuple(_row(s, num_micro_batches) for s in range(num_ranks)),
    )


def _row(stage: int, num_micro_batches: int) -> tuple[Action, ...]:
    return tuple(
        Action(kind=kind, stage=stage, micro_batch=m) for kind in (Kind.F, Kind.B) for m in range(num_micro_batches)
    )
