"""Interleaved 1F1B (arXiv:2104.04473, section 2.2): each rank owns v stages, so the pipeline fills v times as fast.

    3 ranks, 2 stages each, 6 micro-batches, B = 2 F

    rank 0  0>1>2>0)1)2)3>4>....0(((5>1(((3)2(((4)0<<<5)1<<<..2<<<..3(((..4(((..5(((3<<<4<<<5<<<
    rank 1  ..0>1>2>0)1)2)..0(((3>1(((4>2(((5>0<<<3)1<<<4)2<<<5)3(((..4(((..5(((3<<<4<<<5<<<....
    rank 2  ....0>1>2>0)0(((1)1(((2)2(((3>0<<<4>1<<<5>2<<<3)3(((4)4(((5)5(((3<<<4<<<5<<<........

A bubble of (p-1)/(v m + p - 1) of the whole, 1/v of 1F1B's. Rank r runs 2 (p-r-1) + (v-1) g forwards ahead of its first
pair of forward and backward, where a round has g = p micro-batches (`order`), and so keeps at most v p + p - 1 stage
activations on rank 0: (v p + p - 1)/v micro-batches of its share of the model. Traffic is v times that of 1F1B.

The paper and Megatron want m to be a multiple of p. Here m is any number: rounds are larger then, or not full.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.order import check_counts, in_rounds, round_size, whole_backwards
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="Interleaved 1F1B",
    source="arXiv:2104.04473 (Megatron-LM), section 2.2",
    bubble="(p-1)(t_F + t_B)/v",
    memory="p + (p-1)/v on rank 0",
    traffic="2 m (v p - 1) messages, v times as many as 1F1B",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 2) -> Schedule:
    """The interleaved schedule, `chunks` stages a rank in a loop. Raises ScheduleError if a count is below 1."""
    check_counts(num_ranks, num_micro_batches)
    ranks = stages_of_ranks(Placement.LOOP, num_ranks=num_ranks, chunks=chunks)
    size = round_size(num_ranks, num_micro_batches)
    return Schedule(
        name="interleaved",
        num_stages=num_ranks * chunks,
        num_micro_batches=num_micro_batches,
        ranks=ranks,
        actions=tuple(
            whole_backwards(
                in_rounds(stages, num_micro_batches, size),
                in_rounds(stages[::-1], num_micro_batches, size),
                num_warmup=2 * (num_ranks - r - 1) + (chunks - 1) * size,
                num_micro_batches=num_micro_batches,
            )
            for r, stages in enumerate(ranks)
        ),
    )
