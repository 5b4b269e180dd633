"""Where a model is cut to be run a piece at a time: runs of unit calls whose parameters fit into some bytes.

Calls in a row of their execution never need a later run, so stages 0, 1, … can run in this order. Knows dataflows and
sizes; refuses to know tensors and ranks.

    calls    embed  layer 0  layer 1  layer 2  norm  head       at most 5 bytes a stage
    bytes      4       3        2        3       1     4
    stage      0       1        1        2       2     3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwise.describe.flow import Dataflow
from shardwise.errors import LayoutError
from shardwise.plan.cut import cut_stages

__all__ = ["runs_of_calls"]


def runs_of_calls(flow: Dataflow, nbytes: Mapping[str, int], stage_bytes: int) -> dict[int, int]:
    """Node of every unit call -> stage. `nbytes` is parameter -> its bytes; a single call may exceed `stage_bytes`.

    A stage begins only where everything that crosses can be handed over (values of one memory, written in place
    further on, cannot).
    """
    starts = _starts(flow, nbytes, stage_bytes, range(len(flow.calls)))
    if not _can_cut(flow, starts):
        possible = [place for place in range(1, len(flow.calls)) if _can_cut(flow, [0, place])]
        starts = _starts(flow, nbytes, stage_bytes, possible)
    return _stages(flow, starts)


def _starts(flow: Dataflow, nbytes: Mapping[str, int], stage_bytes: int, possible: Sequence[int]) -> list[int]:
    """The calls, by their place in the order, that begin a stage: as few as fit, out of the possible ones."""
    groups = _groups(flow, sorted({0, *possible}))
    starts: list[int] = []
    held: set[str] = set()
    for start, names in groups:
        if not starts or (held and names and _total(held | names, nbytes) > stage_bytes):
            starts.append(start)
            held = set()
        held |= names
    return starts


def _groups(flow: Dataflow, places: Sequence[int]) -> list[tuple[int, set[str]]]:
    """The parameters that are read from one place up to the next."""
    calls = flow.calls
    ends = [*places[1:], len(calls)]
    return [
        (start, {name for call in calls[start:end] for name in call.parameters})
        for start, end in zip(places, ends, strict=True)
    ]


def _total(names: set[str], nbytes: Mapping[str, int]) -> int:
    return sum(nbytes.get(name, 0) for name in names)


def _stages(flow: Dataflow, starts: Sequence[int]) -> dict[int, int]:
    begins = set(starts)
    stages: dict[int, int] = {}
    stage = -1
    for place, call in enumerate(flow.calls):
        stage += place in begins
        stages[call.index] = stage
    return stages


def _can_cut(flow: Dataflow, starts: Sequence[int]) -> bool:
    try:
        cut_stages(flow, _stages(flow, starts), len(starts))
    except LayoutError:
        return False
    return True
