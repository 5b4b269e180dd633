"""V-Min (arXiv:2405.15362, section 3.3): two stages a rank in a V, a third of 1F1B's memory, two thirds of its bubble.

    4 ranks, 2 stages each, 6 micro-batches, F = I = W

    rank 0  0>1>..........0)0(2>0-....1)1(0<3>1-0=2)2(1<4>2-1=3)3(2<5>3-2=4)4(3<4-3=..5)5(4<5-4=......5<5=
    rank 1  ..0>........0)1>..0(0-..1)2>0<1(0=1-2)3>1<2(1=2-3)4>2<3(2=3-4)5>3<4(3=4-5)..4<5(4=5-....5<5=..
    rank 2  ....0>....0)....1>..0(1)0-0<2>0=1(2)1-1<3>1=2(3)2-2<4>2=3(4)3-3<5>3=4(5)4-4<4=..5(5-..5<5=....
    rank 3  ......0>0)........1>1)0(0<0-0=2>2)1(1<1-1=3>3)2(2<2-2=4>4)3(3<3-3=5>5)4(4<4-4=....5(5<5-5=....

Blocks with the smallest steps there are, 1 down and 1 up (`building_blocks`): what a forward kept lives 4 p slots of 6
in both stages of a rank together, so about 2 p/3 stage activations are kept, with those that wait for their weight
gradient at most 2 p/3 + 2: (p+4)/3 micro-batches of a rank's share of the model, rounded up to whole stages (table 1 of
the paper). The bubble is at most 4 p - 3 slots of the 6 m. Where 3 divides p two things would fall on one slot of a
rank, so the backward starts 2 later.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.building_blocks import squeezed_v
from shardwise.schedule.order import check_counts
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="V-Min",
    source="arXiv:2405.15362 (Pipeline Parallelism with Controllable Memory), section 3.3 and table 1",
    bubble="2/3 p (t_F + t_B), if t_F = t_I = t_W; more where these differ",
    memory="(p + 4)/3 on every rank",
    traffic="4 m (p - 1) messages, twice as many as 1F1B",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 2) -> Schedule:
    """The V-Min schedule, two stages a rank. Raises ScheduleError if a count is below 1."""
    check_counts(num_ranks, num_micro_batches)
    return squeezed_v(
        "zb-v-min",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        down=1,
        up=1,
        delay=2 if num_ranks % 3 == 0 else 0,
        capacity=min(-(-2 * num_ranks // 3) + 2, 2 * num_ranks),
    )
