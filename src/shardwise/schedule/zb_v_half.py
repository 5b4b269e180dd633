"""V-Half (arXiv:2405.15362, section 3.3): two stages a rank in a V, half of 1F1B's memory and half of its bubble.

    4 ranks, 2 stages each, 6 micro-batches, F = I = W

    rank 0  0>1>..........0)0(2>0-..1)1(3>1-0<0=2)2(4>2-1<1=3)3(5>3-2<2=4)4(4-..3<5)5(3=5-4<4=....5<5=
    rank 1  ..0>1>......0)....0(2>1)0-..1(0<3>2)1-0=2(1<4>3)2-1=3(2<5>4)3-2=4(3<5)4-3=5(4<5-4=..5<5=..
    rank 2  ....0>....0)1>....1)0(2>0-0<0=2)1(3>1-1<1=3)2(4>2-2<2=4)3(5>3-3<3=5)4(4-..4<5(4=5-5<5=....
    rank 3  ......0>0)....1>1)....0(0<2>2)0-0=1(1<3>3)1-1=2(2<4>4)2-2=3(3<5>5)3-3=4(4<4-4=5(5<5-5=....

Blocks with steps 1 down and 2 up (`building_blocks`): what a forward kept lives p (1 + 2) = 3 p slots of 6 in each of a
rank's stages together, so p + 2 stage activations are kept at most, (p+2)/2 micro-batches of a rank's share of the
model (table 1 of the paper). The bubble is at most 3 (p-1) slots of the 6 m.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.building_blocks import squeezed_v
from shardwise.schedule.order import check_counts
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="V-Half",
    source="arXiv:2405.15362 (Pipeline Parallelism with Controllable Memory), section 3.3 and table 1",
    bubble="(p-1)(t_F + t_B)/2, if t_F = t_I = t_W",
    memory="(p + 2)/2 on every rank",
    traffic="4 m (p - 1) messages, twice as many as 1F1B",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 2) -> Schedule:
    """The V-Half schedule, two stages a rank. Raises ScheduleError if a count is below 1."""
    check_counts(num_ranks, num_micro_batches)
    return squeezed_v(
        "zb-v-half",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        down=1,
        up=2,
        delay=0,
        capacity=min(num_ranks + 2, 2 * num_ranks),
    )
