"""A run's measurements from its folder: events of every rank, recorded steps. Knows files; refuses to know predictions.

    RUN_FOLDER/events/rank-00000.jsonl    steps: seconds, bytes sent, memory
    RUN_FOLDER/timelines/step-000005.json    what every rank did when, in steps that were recorded

Of a run that was resumed, what happened since its last start.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from shardwise.errors import ConfigError
from shardwise.events import Event, read_events
from shardwise.plan.run_measured import RunMeasured
from shardwise.schedule import Action
from shardwise.schedule.recording import Recording, recordings_in
from shardwise.schedule.waits import waits

__all__ = ["measured_of", "read_run"]

WARM_UP = 2  # steps that trace, exchange headers and touch memory for the first time

Key = TypeVar("Key")


def read_run(folder: str | Path) -> RunMeasured:
    """What the run in a folder measured so far. Raises `ConfigError` where there are no events."""
    events = list(read_events(Path(folder) / "events"))
    since, steps = _since_start(events), {event.step for event in events if event.kind == "step"}
    recordings = [
        Recording.read(path)
        for number, path in recordings_in(Path(folder) / "timelines").items()
        if number - 1 in steps
    ]
    return measured_of(since, recordings)


def measured_of(events: Iterable[Event], recordings: Sequence[Recording] = ()) -> RunMeasured:
    """Of the events of one start of a run, of any ranks, and the steps that were recorded in it.

    Raises `ConfigError` where no step was done.
    """
    of_steps: dict[int, dict[int, Event]] = {}
    for event in events:
        if event.kind == "step" and event.step is not None:
            of_steps.setdefault(event.step, {})[event.rank] = event
    if not of_steps:
        raise ConfigError("a report is made of steps, but the run has told of none; train on")
    numbers = sorted(of_steps)
    chosen = [of_steps[number] for number in numbers[WARM_UP:]]
    warm = [each for each in recordings if each.step in numbers[WARM_UP:]]
    seconds = _per_step(chosen, "step_s")
    return RunMeasured(
        steps=len(chosen),
        recorded=len(warm),
        step_s=_median(seconds),
        spread=_spread(seconds),
        pipeline_s=_median([longest for ranks in chosen for longest in _pipeline(ranks)]),
        sums_s=_median([shown for ranks in chosen for shown in _shown_sums(ranks)]),
        optimizer_s=_median(_per_step(chosen, "optimizer_s")),
        data_s=_median(_per_step(chosen, "data_s")),
        memory=_peaks(chosen),
        actions=_actions(warm),
        waiting=_waiting(warm),
        forward_s=_transfers(warm, back=False),
        backward_s=_transfers(warm, back=True),
        traffic=_traffic(chosen),
    )


def _since_start(events: Sequence[Event]) -> list[Event]:
    """Of every rank what follows its last start, on the layout that it has now."""
    found: dict[int, list[Event]] = {}
    for event in events:
        if event.kind in ("start", "relayout"):
            found[event.rank] = []
        found.setdefault(event.rank, []).append(event)
    return [event for own in found.values() for event in own]


def _numbers(events: Iterable[Event], name: str) -> list[float]:
    values = (event.data.get(name) for event in events)
    return [float(value) for value in values if isinstance(value, int | float)]


def _per_step(steps: Sequence[Mapping[int, Event]], name: str) -> list[float]:
    """Of every step, the most that a rank told."""
    told = [_numbers(ranks.values(), name) for ranks in steps]
    return [max(values) for values in told if values]


def _pipeline(ranks: Mapping[int, Event]) -> list[float]:
    """From where a rank has its samples to the end of its last action, of the rank for which that is longest."""
    told = [(_numbers([event], "computed_s"), _numbers([event], "data_s")) for event in ranks.values()]
    known = [computed[0] - data[0] for computed, data in told if computed and data]
    return [max(known)] if known and len(known) == len(ranks) else []


def _shown_sums(ranks: Mapping[int, Event]) -> list[float]:
    """By how much the sums of gradients end later than the last action of any rank; none where a rank told neither."""
    ends = [(_numbers([event], "computed_s"), _numbers([event], "sums_s")) for event in ranks.values()]
    known = [(computed[0], sums[0]) for computed, sums in ends if computed and sums]
    if len(known) < len(ranks):
        return []
    return [max(computed + sums for computed, sums in known) - max(computed for computed, _ in known)]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(values: Sequence[float]) -> float:
    """Half of what the middle half of the values spans, as a share of their median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle if middle else 0.0


def _peaks(steps: Sequence[Mapping[int, Event]]) -> dict[int, int]:
    """The most of any step."""
    found: dict[int, int] = {}
    for ranks in steps:
        for rank, event in ranks.items():
            if isinstance(peak := event.data.get("peak_bytes"), int):
                found[rank] = max(peak, found.get(rank, 0))
    return found


def _medians(found: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    return {key: statistics.median(values) for key, values in found.items()}


def _actions(recordings: Sequence[Recording]) -> dict[str, dict[int, float]]:
    """Medians over all actions of all pipelines. What was computed again on the way is part of it."""
    seconds: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    for timeline in (each for recording in recordings for each in recording.measured):
        for span in timeline.spans:
            if isinstance(span.action, Action) and span.action.kind.computes:
                seconds[span.action.kind.value, span.action.stage].append(span.end_s - span.start_s)
    found: dict[str, dict[int, float]] = {}
    for (kind, stage), middle in sorted(_medians(seconds).items()):
        found.setdefault(kind, {})[stage] = middle
    return found


def _waiting(recordings: Sequence[Recording]) -> dict[int, float]:
    """Bubbles and exposed transfers of a place, in the slowest pipeline of every recorded step."""
    seconds: dict[int, list[float]] = collections.defaultdict(list)
    for recording in recordings:
        for place, each in enumerate(waits(recording.slowest, recording.edges)):
            seconds[place].append(each.bubble_s + each.exposed_s)
    return _medians(seconds)


def _transfers(recordings: Sequence[Recording], *, back: bool) -> dict[tuple[int, int], float]:
    """Of edges on which somebody waited: where nobody did, nothing was seen."""
    seconds: dict[tuple[int, int], list[float]] = collections.defaultdict(list)
    for recording in recordings:
        costs = recording.costs
        for edge, each in (costs.gradient_seconds if back else costs.activation_seconds).items():
            if each > 0:
                seconds[edge].append(each)
    return _medians(seconds)


def _traffic(steps: Sequence[Mapping[int, Event]]) -> dict[int, dict[str, int]]:
    """Medians of every kind."""
    told: dict[int, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for ranks in steps:
        for rank, event in ranks.items():
            sent = event.data.get("sent_bytes")
            for kind, nbytes in (sent if isinstance(sent, Mapping) else {}).items():
                told[rank][kind].append(int(nbytes))
    return {rank: {kind: round(statistics.median(n)) for kind, n in own.items()} for rank, own in told.items()}
