"""Draws a timeline as text. It does not know how the timeline came about: simulated and recorded look alike.

rank 0  0>1>......0<<<1<<<
rank 1  ..0>1>0<<<1<<<....
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.timeline import Span, Timeline

__all__ = ["draw"]

_IDLE = "."
_MARKS: Mapping[Kind, str] = MappingProxyType({Kind.F: ">", Kind.B: "<", Kind.I: "<", Kind.W: "="})
_MEANINGS: Mapping[Kind, str] = MappingProxyType(
    {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}
)
_MAX_AUTO_WIDTH = 160


def draw(timeline: Timeline, *, width: int | None = None) -> str:
    """One row a rank (one a stage, where a rank owns several), time to the right, and a legend below.

    "3>" is the forward of micro-batch 3, "3<" its backward, drawn as long as they take; an action too short
    for its number shows only its mark. `width` is the number of columns; if not given, the fewest that show
    every number (at most 160). Raises ScheduleError if `width` is below 1.
    """
    if width is not None and width < 1:
        raise ScheduleError(f"a drawing has 1 or more columns, but width={width}; use 80, or leave it out")
    shown = [(span, span.action) for span in timeline.spans if isinstance(span.action, Action)]
    if width is None:
        width = _fitting_width(timeline, shown)
    columns_per_second = width / timeline.seconds if timeline.seconds else 0.0
    label_of = _labels(timeline, shown)
    rows = {label: [_IDLE] * width for label in label_of.values()}
    for span, action in shown:
        start = round((span.start_s - timeline.start_s) * columns_per_second)
        end = round((span.end_s - timeline.start_s) * columns_per_second)
        rows[label_of[span.rank, action.stage]][start:end] = _cell(action, end - start)
    longest = max(map(len, rows), default=0)
    lines = [f"{label:<{longest}}  {''.join(cells)}" for label, cells in rows.items()]
    return "\n".join([*lines, "", _legend({action.kind for _, action in shown}), str(timeline)])


def _labels(timeline: Timeline, shown: list[tuple[Span, Action]]) -> dict[tuple[int, int], str]:
    """(rank, stage) -> the name of its row, in the order of the rows."""
    stages: dict[int, set[int]] = {r: set() for r in range(timeline.num_ranks)}
    for span, action in shown:
        stages[span.rank].add(action.stage)
    return {
        (r, s): f"rank {r} stage {s}" if len(owned) > 1 else f"rank {r}"
        for r, owned in stages.items()
        for s in sorted(owned) or [0]
    }


def _fitting_width(timeline: Timeline, shown: list[tuple[Span, Action]]) -> int:
    """The fewest columns in which the shortest action has room for the longest number and a mark."""
    shortest_s = min((span.end_s - span.start_s for span, _ in shown if span.end_s > span.start_s), default=0.0)
    if shortest_s == 0.0:
        return 1
    num_digits = len(str(max(action.micro_batch for _, action in shown)))
    # Whole columns for the shortest action, so that equal actions look equal.
    for columns_of_shortest in range(num_digits + 1, 0, -1):
        columns = math.ceil(timeline.seconds / shortest_s * columns_of_shortest - 1e-6)  # 66.00000001 are 66
        if columns <= _MAX_AUTO_WIDTH:
            return columns
    return _MAX_AUTO_WIDTH


def _cell(action: Action, width: int) -> str:
    number, mark = str(action.micro_batch), _MARKS[action.kind]
    return number.ljust(width, mark) if len(number) < width else mark * width


def _legend(kinds: set[Kind]) -> str:
    shown = [kind for kind in Kind if kind in kinds and not (kind is Kind.I and Kind.B in kinds)]  # one mark
    parts = [f"3{_MARKS[kind]} {_MEANINGS[kind]} of micro-batch 3" for kind in shown]
    return "   ".join([*parts, f"{_IDLE} idle"])
