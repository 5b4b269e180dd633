"""Why ranks of a timeline computed nothing: others had not computed yet, or they had and it was on its way.

    rank 0  0F0▇▇▇▇▇▇▇▇
    rank 1  ▕ bubble  ▕ exposed ▏0F0▇▇▇▇     the value was made at the first bar's end and was there at the second
                                             one's start: sending, receiving and the runtime take the time between

Only seconds in which a rank could have computed are told: communication beside computing is hidden and does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.schedule.actions import Action, Transfer
from shardwise.schedule.graph import Edges
from shardwise.schedule.produced import Produced
from shardwise.schedule.timeline import Span, Timeline

__all__ = ["Waits", "waits"]


@dataclass(frozen=True, kw_only=True)
class Waits:
    """What one rank did with its seconds: computing, waiting for others to compute, and everything else."""

    busy_s: float
    bubble_s: float
    exposed_s: float

    @property
    def seconds(self) -> float:
        return self.busy_s + self.bubble_s + self.exposed_s


def waits(timeline: Timeline, edges: Edges | None = None) -> tuple[Waits, ...]:
    """[r]: how rank r spent the timeline, from its first start to its last end; they add up to `timeline.seconds`.

    Behind its last action a rank waits for what runs beside its work, such as sums of gradients, and then for others:
    bubble. `edges` is the chain if not given.
    """
    produced = Produced(timeline, edges)
    rows: list[list[tuple[Span, Action]]] = [[] for _ in range(timeline.num_ranks)]
    beside_s = [timeline.start_s] * timeline.num_ranks
    for span in timeline.spans:
        if isinstance(span.action, Action) and span.action.kind.computes:
            rows[span.rank].append((span, span.action))
        elif not isinstance(span.action, Transfer):
            beside_s[span.rank] = max(beside_s[span.rank], span.end_s)
    return tuple(_of_rank(row, last_s, produced, timeline) for row, last_s in zip(rows, beside_s, strict=True))


def _of_rank(row: list[tuple[Span, Action]], beside_s: float, produced: Produced, timeline: Timeline) -> Waits:
    busy_s = bubble_s = exposed_s = 0.0
    now_s = timeline.start_s
    for span, action in sorted(row, key=lambda item: item[0].start_s):
        made_s = max((each.end_s for each in produced.inputs(action) if each.rank != span.rank), default=now_s)
        idle_s = max(span.start_s - now_s, 0.0)
        waited_s = min(max(made_s - now_s, 0.0), idle_s)
        bubble_s += waited_s
        exposed_s += idle_s - waited_s
        busy_s += span.end_s - max(span.start_s, now_s)
        now_s = max(now_s, span.end_s)
    exposed_s += max(beside_s - now_s, 0.0)
    bubble_s += timeline.start_s + timeline.seconds - max(now_s, beside_s)
    return Waits(busy_s=busy_s, bubble_s=bubble_s, exposed_s=exposed_s)
