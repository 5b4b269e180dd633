"""1F1B, or PipeDream-flush (arXiv:2006.09503, arXiv:2104.04473): a backward as soon as there is one to run.

    4 stages, 8 micro-batches, B = 2 F; GPipe's bubble of (p-1)/(m+p-1), but at most p-s micro-batches in
    flight

    rank 0  0>1>2>3>............0<<<4>1<<<5>2<<<6>3<<<7>4<<<..5<<<..6<<<..7<<<
    rank 1  ..0>1>2>........0<<<3>1<<<4>2<<<5>3<<<6>4<<<7>5<<<..6<<<..7<<<....
    rank 2  ....0>1>....0<<<2>1<<<3>2<<<4>3<<<5>4<<<6>5<<<7>6<<<..7<<<........
    rank 3  ......0>0<<<1>1<<<2>2<<<3>3<<<4>4<<<5>5<<<6>6<<<7>7<<<............

Right for any stage graph, not only for the chain: what a chain orders, a graph with fewer paths also orders.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="1F1B",
    source="arXiv:2006.09503 (PipeDream-flush), section 3.2; arXiv:2104.04473, section 2.2.1",
    bubble="(p-1)(t_F + t_B)",
    memory="p - r on rank r",
    traffic="2 m (p - 1) messages",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 1) -> Schedule:
    """The 1F1B schedule, one stage a rank. Raises ScheduleError if a count is below 1."""
    return Schedule(
        name="1f1b",
        num_stages=num_ranks,
        num_micro_batches=num_micro_batches,
        ranks=tuple((s,) for s in range(num_ranks)),
        actions=tuple(_row(s, num_ranks, num_micro_batches) for s in range(num_ranks)),
    )


def _row(stage: int, num_stages: int, num_micro_batches: int) -> tuple[Action, ...]:
    forwards = [Action(kind=Kind.F, stage=stage, micro_batch=m) for m in range(num_micro_batches)]
    backwards = [Action(kind=Kind.B, stage=stage, micro_batch=m) for m in range(num_micro_batches)]
    num_warmup = min(num_stages - stage - 1, num_micro_batches)  # forwards until the first one can be back
    num_steady = num_micro_batches - num_warmup
    steady = zip(forwards[num_warmup:], backwards[:num_steady], strict=True)
    return (
        *forwards[:num_warmup],
        *(action for pair in steady for action in pair),
        *backwards[num_steady:],
    )
