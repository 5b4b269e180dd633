"""Which earlier actions an action of a timeline reads, on the own rank and on others. Knows order, not costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.graph import Edges, checked, predecessors, successors
from shardwise.schedule.timeline import Span, Timeline

__all__ = ["Produced"]

_Key = tuple[int, int]  # stage, micro-batch


class Produced:
    """The spans of a timeline by what they made; `edges` is the chain of its stages if not given."""

    def __init__(self, timeline: Timeline, edges: Edges | None = None) -> None:
        computed = [(span, a) for span in timeline.spans if isinstance(a := span.action, Action) and a.kind.computes]
        num_stages = 1 + max((action.stage for _, action in computed), default=-1)
        edges = checked(edges, num_stages)
        self._below, self._above = predecessors(edges, num_stages), successors(edges, num_stages)
        self._forward = _by_key(computed, (Kind.F,))
        self._backward = _by_key(computed, (Kind.B, Kind.I))

    def inputs(self, action: Action) -> Iterator[Span]:
        """What made the inputs of `action`, as far as the timeline holds it: other stages first."""
        s, m = action.stage, action.micro_batch
        if action.kind is Kind.F:
            needed = [self._forward.get((t, m)) for t in self._below[s]]
        elif action.kind in (Kind.B, Kind.I):
            needed = [*(self._backward.get((t, m)) for t in self._above[s]), self._forward.get((s, m))]
        else:
            needed = [(self._backward if action.kind is Kind.W else self._forward).get((s, m))]
        return (span for span in needed if span is not None)


def _by_key(computed: list[tuple[Span, Action]], kinds: tuple[Kind, ...]) -> Mapping[_Key, Span]:
    return {(a.stage, a.micro_batch): span for span, a in computed if a.kind in kinds}
