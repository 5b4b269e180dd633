"""DualPipeV: DualPipe (arXiv:2412.19437, section 3.2.1) cut in half, so that no weights are held twice.

    3 ranks, 2 stages each, 6 micro-batches, F = I = W

    rank 0  0>1>2>3>4>0)0(0-1)1(1-2)5>2(((3)0<<<3(((4)..1<<<4(((5)..2<<<5(((3<3=4<4=5<5=
    rank 1  ..0>1>2>0)3>1)0(0-2)4>1(((3)0<<<5>2(((4)1<<<3(((5)..2<<<4(((3<<<5(4<5-5<4=5=
    rank 2  ....0>0)1>1)2>2)3>0(((3)0<<<4>1(((4)1<<<5>2(((5)2<<<3(((3<<<4(((4<5(5<4=5-5=

Two stages a rank in a V. In the steady phase a rank runs the forward of one stage next to the whole backward of the
other one, of two micro-batches that do not know each other: what each of them sends and receives, and the all-to-alls
of experts, can travel beside the other's computation. The bubble is (p-1)(t_FB + t_B - 3 t_W)/2, t_FB being a forward
and a backward side by side and each t half of a rank's share; with F = I = W and nothing gained side by side that is
p - 1 slots of 6 m. At most 2 p + 1 stage activations are kept: p + 1/2 micro-batches of a rank's share of the model.
With m < 2 p there is no steady phase: the blocks of `building_blocks` are squeezed into the same memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from shardwise.schedule.about import About
from shardwise.schedule.actions import Kind
from shardwise.schedule.building_blocks import squeezed_v
from shardwise.schedule.order import Visit, actions, check_counts
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule

__all__ = ["ABOUT", "generate"]

ABOUT = About(
    title="DualPipeV",
    source="arXiv:2412.19437 (DeepSeek-V3), section 3.2.1; cut in half as in Sea AI Lab's note on DualPipe",
    bubble="(p-1)(t_FB + t_B - 3 t_W)/2, t_FB a forward and a backward side by side",
    memory="p + 1/2 on every rank",
    traffic="4 m (p - 1) messages, twice as many as 1F1B",
)


def generate(*, num_ranks: int, num_micro_batches: int, chunks: int = 2) -> Schedule:
    """The DualPipeV schedule, two stages a rank. Raises ScheduleError if a count is below 1."""
    check_counts(num_ranks, num_micro_batches)
    if num_micro_batches < 2 * num_ranks:
        capacity = 2 * num_ranks + 1
        return squeezed_v(
            "dualpipe-v",
            num_ranks=num_ranks,
            num_micro_batches=num_micro_batches,
            down=2,
            up=4,
            delay=0,
            capacity=capacity,
        )
    ranks = stages_of_ranks(Placement.V, num_ranks=num_ranks, chunks=2)
    return Schedule(
        name="dualpipe-v",
        num_stages=2 * num_ranks,
        num_micro_batches=num_micro_batches,
        ranks=ranks,
        actions=tuple(
            actions(_counted(_phases(num_ranks, r, num_micro_batches), stages), num_micro_batches)
            for r, stages in enumerate(ranks)
        ),
    )


def _phases(num_ranks: int, rank: int, num_micro_batches: int) -> Iterator[str]:
    """What a rank does, its two stages called 0 and 1; W is the weight gradient that waits longest."""
    p, r = num_ranks, rank
    yield from ["F0"] * (2 * (p - r - 1))
    yield from ["F0", "F1"] * (r + 1)
    yield from ["I1", "W", "F1"] * (p - r - 1)
    yield from ["F0", "B1", "F1", "B0"] * (num_micro_batches - 2 * p + r + 1)
    yield from ["B1", "F1", "B0"] * (p - r - 1)
    # From half of what is left on, backwards are split: their weight gradients fill the bubble at the end.
    whole = r + 1
    yield from (f"{'B' if k < whole else 'I'}{1 - k % 2}" for k in range(2 * (r + 1)))
    yield from ["W", "I0"] * (p - r - 1)
    yield from ["W"] * (r + 1)


def _counted(phases: Iterator[str], stages: tuple[int, ...]) -> Iterator[tuple[Kind, Visit]]:
    """Gives every item its micro-batch: each kind of each stage takes them in order."""
    forwards, backwards = [0, 0], [0, 0]
    waiting: deque[Visit] = deque()
    for item in phases:
        if item == "W":
            yield Kind.W, waiting.popleft()
            continue
        kind, half = Kind(item[0]), int(item[1])
        counts = forwards if kind is Kind.F else backwards
        visit = (stages[half], counts[half])
        counts[half] += 1
        if kind is Kind.I:
            waiting.append(visit)
        yield kind, visit
