"""ZB-H1 (arXiv:2401.10241, section 3.1): 1F1B whose weight gradients fill the bubble, in 1F1B's memory.

    4 ranks, 8 micro-batches, F = I = W

    rank 0  0>1>2>3>......0<0=4>1<1=5>2<2=6>3<3=7>4<4=5<5=6<6=7<7=
    rank 1  ..0>1>2>....0<3>1<0=4>2<1=5>3<2=6>4<3=7>5<4=6<5=7<6=7=
    rank 2  ....0>1>..0<2>1<3>2<0=4>3<1=5>4<2=6>5<3=7>6<4=7<5=6=7=
    rank 3  ......0>0<1>1<2>2<3>3<0=4>4<1=5>5<2=6>6<3=7>7<4=5=6=7=

Rank s runs p-s forwards first, then input gradient, weight gradient and forward in turn, the weight gradients s
micro-batches behind. What the forward kept lives until its weight gradient is done, so every rank has p micro-batches
in flight, as many as rank 0 in 1F1B. The bubble is (p-1)(t_F + t_I - t_W) (table 2 of the paper), a third of 1F1B's.

With v stages a rank the order is that of interleaved 1F1B with half its warm-up: 1/v of the bubble and p micro-batches.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.order import check_counts, in_rounds, round_size, split_backwards
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="ZB-H1",
    source="arXiv:2401.10241 (Zero Bubble Pipeline Parallelism), section 3.1 and table 2",
    bubble="(p-1)(t_F + t_I - t_W)/v",
    memory="p on every rank",
    traffic="2 m (v p - 1) messages, as 1F1B for v = 1",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 1) -> Schedule:
    """The ZB-H1 schedule, `chunks` stages a rank in a loop. Raises ScheduleError if a count is below 1."""
    check_counts(num_ranks, num_micro_batches)
    ranks = stages_of_ranks(Placement.LOOP, num_ranks=num_ranks, chunks=chunks)
    size = round_size(num_ranks, num_micro_batches)
    return Schedule(
        name="zb-h1",
        num_stages=num_ranks * chunks,
        num_micro_batches=num_micro_batches,
        ranks=ranks,
        actions=tuple(
            split_backwards(
                in_rounds(stages, num_micro_batches, size),
                in_rounds(stages[::-1], num_micro_batches, size),
                num_warmup=(chunks - 1) * size + num_ranks - r,
                num_behind=r,
                num_micro_batches=num_micro_batches,
            )
            for r, stages in enumerate(ranks)
        ),
    )
