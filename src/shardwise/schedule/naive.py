"""Layer parallelism without a pipeline: one micro-batch goes forward through all stages and back before the
next.

    3 stages, 2 micro-batches, B = 2 F; a bubble of (p-1)/p, and one micro-batch in flight

    rank 0  0>............0<<<1>............1<<<
    rank 1  ..0>......0<<<......1>......1<<<....
    rank 2  ....0>0<<<............1>1<<<........

It knows the order of work and nothing else. Where the stage graph has towers side by side, they still
overlap.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="Naive",
    source="layer parallelism; the schedule before pipelining in arXiv:1811.06965, section 2.3",
    bubble="(p-1) m (t_F + t_B)",
    memory="1",
    traffic="2 m (p - 1) messages",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 1) -> Schedule:
    """The naive schedule, one stage a rank. Raises ScheduleError if a count is below 1."""
    return Schedule(
        name="naive",
        num_stages=num_ranks,
        num_micro_batches=num_micro_batches,
        ranks=tuple((s,) for s in range(num_ranks)),
        actions=tuple(_row(s, num_micro_batches) for s in range(num_ranks)),
    )


def _row(stage: int, num_micro_batches: int) -> tuple[Action, ...]:
    return tuple(
        Action(kind=kind, stage=stage, micro_batch=m) for m in range(num_micro_batches) for kind in (Kind.F, Kind.B)
    )
