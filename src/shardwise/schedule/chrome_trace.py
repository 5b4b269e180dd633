"""A timeline as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing load.

The format is that of Chromium's "Trace Event Format": a process a rank, a thread for what it computes and one for what
it sends, arrows from who makes a value to who reads it. It does not know how the timeline came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shardwise.schedule.actions import Action, StageAction, Transfer
from shardwise.schedule.graph import Edges
from shardwise.schedule.produced import Produced
from shardwise.schedule.timeline import Span, Timeline

__all__ = ["to_chrome_trace"]

_COMPUTE, _LINK, _BESIDE = 0, 1, 2  # threads of a rank
_THREADS = ("compute", "link", "beside")
_INSIDE_US = 1e-3  # an arrow starts this long before the end of its slice, else it would belong to the next one


def to_chrome_trace(timeline: Timeline, *, edges: Edges | None = None, us_per_unit: float = 1e6) -> str:
    """JSON text. Times are microseconds from the first start; `us_per_unit` of them are a second of the timeline.

    `edges` of the stage graph is the chain if not given. Raises ScheduleError where it does not fit the stages.
    """
    events = [
        *_names(timeline),
        *(_slice(span, timeline, us_per_unit) for span in timeline.spans),
        *_arrows(timeline, Produced(timeline, edges), us_per_unit),
    ]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _names(timeline: Timeline) -> Iterator[Mapping[str, Any]]:
    threads = {_thread(span) for span in timeline.spans}
    for rank in range(timeline.num_ranks):
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        for thread in sorted(threads):
            yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": _THREADS[thread]}}


def _slice(span: Span, timeline: Timeline, us_per_unit: float) -> Mapping[str, Any]:
    name, kind, about = _described(span.action)
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "pid": span.rank,
        "tid": _thread(span),
        "ts": (span.start_s - timeline.start_s) * us_per_unit,
        "dur": (span.end_s - span.start_s) * us_per_unit,
        "args": about,
    }


def _thread(span: Span) -> int:
    if isinstance(span.action, Transfer):
        return _LINK
    return _COMPUTE if isinstance(span.action, Action) and span.action.kind.computes else _BESIDE


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


def _arrows(timeline: Timeline, produced: Produced, us_per_unit: float) -> Iterator[Mapping[str, Any]]:
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
            common = {"name": what, "cat": "transfer", "id": number, "tid": _COMPUTE}
            yield {"ph": "s", "pid": made.rank, "ts": max(end_us - _INSIDE_US, start_us), **common}
            yield {
                "ph": "f",
                "bp": "e",  # to the slice that stands here, not to the next one
                "pid": span.rank,
                "ts": (span.start_s - timeline.start_s) * us_per_unit,
                **common,
            }
            number += 1
