"""A timeline as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing load.

The format is that of Chromium's "Trace Event Format": a process a rank, with a thread for what it computes, one for
each rank that it sends to and one for each kind of thing that runs beside (slices of one thread may not overlap), and
arrows from who makes a value to who reads it. It does not know how the timeline came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardwise.schedule.actions import Action, StageAction, Transfer
from shardwise.schedule.graph import Edges
from shardwise.schedule.produced import Produced
from shardwise.schedule.timeline import Span, Timeline

__all__ = ["to_chrome_trace"]

_COMPUTE = "compute"  # the first thread of a rank
_INSIDE_US = 1e-3  # an arrow starts this long before the end of its slice, else it would belong to the next one


def to_chrome_trace(
    shown: Timeline | Mapping[str, Timeline], *, edges: Edges | None = None, us_per_unit: float = 1e6
) -> str:
    """JSON text. Times are microseconds from the first start; `us_per_unit` of them are a second of a timeline.

    Several timelines stand below each other, the names of their ranks begin with theirs. `edges` of the stage graph is
    the chain if not given. Raises ScheduleError where it does not fit the stages.
    """
    named = {"": shown} if isinstance(shown, Timeline) else shown
    events: list[Mapping[str, Any]] = []
    first = 0  # process number of a timeline's rank 0
    for name, timeline in named.items():
        threads = _threads(timeline)
        of_timeline = [
            *_names(timeline, name, sorted(set(threads.values()))),
            *(_slice(span, timeline, us_per_unit, threads[span.action]) for span in timeline.spans),
            *_arrows(timeline, Produced(timeline, edges), us_per_unit, f"{name} " if name else ""),
        ]
        events += [{**event, "pid": first + event["pid"]} for event in of_timeline]
        first += timeline.num_ranks
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _threads(timeline: Timeline) -> Mapping[Action | StageAction | Transfer, tuple[int, str]]:
    """The thread on which something is drawn: number and name."""
    owner = {span.action.stage: span.rank for span in timeline.spans if not isinstance(span.action, Transfer)}
    name_of: dict[Action | StageAction | Transfer, str] = {}
    for span in timeline.spans:
        if isinstance(span.action, Transfer):
            name_of[span.action] = f"to rank {owner.get(span.action.target, '?')}"
        elif isinstance(span.action, Action) and span.action.kind.computes:
            name_of[span.action] = _COMPUTE
        else:
            name_of[span.action] = f"beside: {span.action.kind.value}"
    number = {name: index for index, name in enumerate(sorted(set(name_of.values()), key=lambda n: (n != _COMPUTE, n)))}
    return {action: (number[name], name) for action, name in name_of.items()}


def _names(timeline: Timeline, name: str, threads: Sequence[tuple[int, str]]) -> Iterator[Mapping[str, Any]]:
    for rank in range(timeline.num_ranks):
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"{name} rank {rank}".lstrip()}}
        for number, thread in threads:
            yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": thread}}


def _slice(span: Span, timeline: Timeline, us_per_unit: float, thread: tuple[int, str]) -> Mapping[str, Any]:
    name, kind, about = _described(span.action)
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "pid": span.rank,
        "tid": thread[0],
        "ts": (span.start_s - timeline.start_s) * us_per_unit,
        "dur": (span.end_s - span.start_s) * us_per_unit,
        "args": about,
    }


def _described(action: Action | StageAction | Transfer) -> tuple[str, str, Mapping[str, Any]]:
    """Name, category and arguments of a slice."""
    if isinstance(action, Transfer):
        what = "gradient" if action.gradient else "activation"
        about = {"micro_batch": action.micro_batch, "source": action.source, "target": action.target}
        return f"{what} {action.micro_batch} stage {action.source} to {action.target}", what, about
    if isinstance(action, StageAction):
        return f"{action.kind.value} stage {action.stage}", action.kind.value, {"stage": action.stage}
    name = f"{action.kind.value}{action.micro_batch} stage {action.stage}"
    return name, action.kind.value, {"micro_batch": action.micro_batch, "stage": action.stage}


def _arrows(timeline: Timeline, produced: Produced, us_per_unit: float, prefix: str) -> Iterator[Mapping[str, Any]]:
    """From the end of an action to the start of each that reads what it sent to another rank."""
    number = 0
    for span in timeline.spans:
        if not isinstance(span.action, Action) or not span.action.kind.computes:
            continue
        for made in produced.inputs(span.action):
            if made.rank == span.rank:
                continue
            what = "activation" if span.action.kind.value == "F" else "gradient"
            end_us = (made.end_s - timeline.start_s) * us_per_unit
            start_us = (made.start_s - timeline.start_s) * us_per_unit
            common = {"name": what, "cat": "transfer", "id": f"{prefix}{number}", "tid": 0}
            yield {"ph": "s", "pid": made.rank, "ts": max(end_us - _INSIDE_US, start_us), **common}
            yield {
                "ph": "f",
                "bp": "e",  # to the slice that stands here, not to the next one
                "pid": span.rank,
                "ts": (span.start_s - timeline.start_s) * us_per_unit,
                **common,
            }
            number += 1
