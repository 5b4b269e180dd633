"""ZB-H2 (arXiv:2401.10241, section 3.2): no rank waits between its first and its last action, in twice 1F1B's memory.

    4 ranks, 8 micro-batches, F = I = W

    rank 0  0>1>2>3>4>5>6>0<0=7>1<1=2<2=3<3=4<4=5<5=6<6=7<7=......
    rank 1  ..0>1>2>3>4>0<5>1<6>2<0=7>3<1=4<2=5<3=6<4=7<5=6=7=....
    rank 2  ....0>1>2>0<3>1<4>2<5>3<6>4<0=7>5<1=6<2=7<3=4=5=6=7=..
    rank 3  ......0>0<1>1<2>2<3>3<4>4<5>5<6>6<0=7>7<1=2=3=4=5=6=7=

Rank s runs 2 (p-s) - 1 forwards first and its weight gradients 2 s micro-batches behind: 2 p - 1 of them in flight
on every rank. The bubble is (p-1)(t_F + t_I - 2 t_W) (table 2 of the paper), 0 where all three are equal. Ranks begin
and end one after another, so the gain over ZB-H1 shows where the next step begins without waiting for the last rank,
and where costs vary. With less than 2 p - 1 micro-batches the weight gradients are fewer behind, down to ZB-H1's.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.order import check_counts, in_rounds, split_backwards
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="ZB-H2",
    source="arXiv:2401.10241 (Zero Bubble Pipeline Parallelism), section 3.2 and table 2",
    bubble="(p-1)(t_F + t_I - 2 t_W) between a rank's first and last action",
    memory="2p - 1 on every rank",
    traffic="2 m (p - 1) messages, as 1F1B",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 1) -> Schedule:
    """The ZB-H2 schedule, one stage a rank. Raises ScheduleError if a count is below 1."""
    check_counts(num_ranks, num_micro_batches)
    too_few = max(0, 2 * num_ranks - 1 - num_micro_batches)

    def visits(s: int) -> list[tuple[int, int]]:
        return in_rounds((s,), num_micro_batches, num_micro_batches)

    return Schedule(
        name="zb-h2",
        num_stages=num_ranks,
        num_micro_batches=num_micro_batches,
        ranks=tuple((s,) for s in range(num_ranks)),
        actions=tuple(
            split_backwards(
                visits(s),
                visits(s),
                num_warmup=2 * (num_ranks - s) - 1,
                num_behind=max(s, 2 * s - too_few),
                num_micro_batches=num_micro_batches,
            )
            for s in range(num_ranks)
        ),
    )
