"""Looped breadth-first (arXiv:2211.05953, section 3.3): GPipe over v stages a rank, all micro-batches at once in each.

    3 ranks, 2 stages each, 4 micro-batches, B = 2 F

    rank 0  0>1>2>3>0)1)2)3)............0(((1(((2(((3(((0<<<1<<<2<<<3<<<
    rank 1  ..0>1>2>3>0)1)2)3)......0(((1(((2(((3(((0<<<1<<<2<<<3<<<....
    rank 2  ....0>1>2>3>0)1)2)3)0(((1(((2(((3(((0<<<1<<<2<<<3<<<........

A bubble of (p-1)/(v m + p - 1) for m >= p, and all m micro-batches in flight. A stage works through all micro-batches
without a break, so with sharded data parallelism its parameters are gathered, and its gradients reduced, once a step.
Traffic is that of interleaved 1F1B.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.actions import Kind
from shardwise.schedule.order import actions, check_counts, in_rounds
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="Looped breadth-first (BFS)",
    source="arXiv:2211.05953 (Breadth-First Pipeline Parallelism), section 3.3",
    bubble="(p-1)(t_F + t_B)/v",
    memory="m",
    traffic="2 m (v p - 1) messages; one gather and one reduction a stage with sharded data parallelism",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 2) -> Schedule:
    """The breadth-first schedule, `chunks` stages a rank in a loop. Raises ScheduleError if a count is below 1."""
    check_counts(num_ranks, num_micro_batches)
    ranks = stages_of_ranks(Placement.LOOP, num_ranks=num_ranks, chunks=chunks)
    m = num_micro_batches
    return Schedule(
        name="looped-bfs",
        num_stages=num_ranks * chunks,
        num_micro_batches=m,
        ranks=ranks,
        actions=tuple(
            actions(
                [
                    *((Kind.F, visit) for visit in in_rounds(stages, m, m)),
                    *((Kind.B, visit) for visit in in_rounds(stages[::-1], m, m)),
                ],
                m,
            )
            for stages in ranks
        ),
    )
