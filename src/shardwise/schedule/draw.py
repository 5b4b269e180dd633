"""Draws a timeline as text. It does not know how the timeline came about: simulated and recorded look alike.

rank 0  0>1>......0<<<1<<<
rank 1  ..0>1>0<<<1<<<....

A rank has one row, also where it owns several stages: the second of them is drawn with other marks.

rank 0  0>1>0)1)......0(((1(((0<<<1<<<
rank 1  ..0>1>0)1)0(((1(((0<<<1<<<....
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action
from shardwise.schedule.timeline import Span, Timeline

__all__ = ["draw"]

_IDLE = "."
# kind -> the marks of a rank's first, second, third and fourth stage; from the fifth on they begin anew
_MARKS: Mapping[str, str] = MappingProxyType({"F": ">)]}", "C": "^'`\"", "B": "<([{", "I": "<([{", "W": "=-~_"})
_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "F": "forward",
        "C": "forward again",
        "B": "backward",
        "I": "input gradient",
        "W": "weight gradient",
    }
)
_ORDINALS = ("first", "second", "third", "fourth")
_MAX_AUTO_WIDTH = 160


def draw(timeline: Timeline, *, width: int | None = None) -> str:
    """One row a rank, time to the right, and a legend below.

    "3>" is the forward of micro-batch 3, "3<" its backward, drawn as long as they take; an action too short
    for its number shows only its mark. On the second stage of a rank they are "3)" and "3(". `width` is the
    number of columns; if not given, the fewest that show every number (at most 160). Raises ScheduleError if
    `width` is below 1.
    """
    if width is not None and width < 1:
        raise ScheduleError(f"a drawing has 1 or more columns, but width={width}; use 80, or leave it out")
    shown = [(span, a) for span in timeline.spans if isinstance(a := span.action, Action) and a.kind.value in _MARKS]
    if width is None:
        width = _fitting_width(timeline, shown)
    columns_per_second = width / timeline.seconds if timeline.seconds else 0.0
    chunk_of = _chunks(timeline, shown)
    rows = [[_IDLE] * width for _ in range(timeline.num_ranks)]
    for span, action in shown:
        start = round((span.start_s - timeline.start_s) * columns_per_second)
        end = round((span.end_s - timeline.start_s) * columns_per_second)
        rows[span.rank][start:end] = _cell(action, chunk_of[action.stage], end - start)
    longest = len(f"rank {timeline.num_ranks - 1}")
    lines = [f"{f'rank {r}':<{longest}}  {''.join(cells)}" for r, cells in enumerate(rows)]
    legend = _legend({action.kind.value for _, action in shown}, max(chunk_of.values(), default=0))
    return "\n".join([*lines, "", *legend, str(timeline)])


def _chunks(timeline: Timeline, shown: list[tuple[Span, Action]]) -> dict[int, int]:
    """stage -> its number among the stages of its rank."""
    stages: list[set[int]] = [set() for _ in range(timeline.num_ranks)]
    for span, action in shown:
        stages[span.rank].add(action.stage)
    return {s: chunk for owned in stages for chunk, s in enumerate(sorted(owned))}


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


def _cell(action: Action, chunk: int, width: int) -> str:
    marks = _MARKS[action.kind.value]
    number, mark = str(action.micro_batch), marks[chunk % len(marks)]
    return number.ljust(width, mark) if len(number) < width else mark * width


def _legend(kinds: set[str], last_chunk: int) -> list[str]:
    both = {"B", "I"} <= kinds  # which have one mark
    known = [kind for kind in _MARKS if kind in kinds and not (both and kind == "I")]
    meanings = {**_MEANINGS, "B": "backward or input gradient"} if both else _MEANINGS
    parts = [f"3{_MARKS[kind][0]} {meanings[kind]} of micro-batch 3" for kind in known]
    lines = ["   ".join([*parts, f"{_IDLE} idle"])]
    if last_chunk > 0:
        each = [
            f"{' '.join(_MARKS[kind][chunk] for kind in known)} on the {_ORDINALS[chunk]}"
            for chunk in range(min(last_chunk + 1, len(_ORDINALS)))
        ]
        lines.append(f"{', '.join(each)} stage of a rank")
    return lines
