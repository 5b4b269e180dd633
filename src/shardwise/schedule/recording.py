"""A step of a real run beside its prediction, and the file that keeps both. Knows no clock and no model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shardwise.errors import ScheduleError
from shardwise.files import read_text
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges
from shardwise.schedule.measured_costs import measured_costs
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.simulate import simulate
from shardwise.schedule.timeline import Timeline
from shardwise.schedule.waits import waits

__all__ = ["Recording", "recordings_in"]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What the pipelines of a run did in one step.

    measured      of every pipeline (one a replica and shard), its ranks in their order along it; all on one clock
    planned       the step as it was predicted before the run; None where nobody did
    sums_s        for which a rank waited for sums of gradients behind its last action, at most
    clock_error_s by how much the clocks of two ranks may be misjudged, at most
    """

    step: int
    layout: str
    schedule: Schedule
    edges: Edges
    measured: tuple[Timeline, ...]
    planned: Timeline | None = None
    sums_s: float = 0.0
    clock_error_s: float = 0.0

    def __post_init__(self) -> None:
        counts = [timeline.num_ranks for timeline in self.measured]
        if not counts or set(counts) != {self.schedule.num_ranks}:
            raise ScheduleError(
                f"a recording holds 1 or more pipelines of as many ranks as its schedule, but they have {counts} and "
                f"it has {self.schedule.num_ranks}; record them all"
            )

    @cached_property
    def slowest(self) -> Timeline:
        """The pipeline that took longest."""
        return max(self.measured, key=lambda timeline: timeline.seconds)

    @cached_property
    def simulated(self) -> Timeline:
        """What the simulator makes of the costs that were measured in the slowest pipeline."""
        return simulate(self.schedule, self.edges, costs=self.costs)

    @cached_property
    def costs(self) -> Costs:
        """The medians of the slowest pipeline."""
        return measured_costs(self.slowest, self.schedule, self.edges)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they waited for others to compute, in the slowest pipeline."""
        return self._share([each.bubble_s for each in waits(self.slowest, self.edges)])

    @property
    def exposed(self) -> float:
        """The share in which all that was needed had been computed: transfers, and the runtime between actions."""
        return self._share([each.exposed_s for each in waits(self.slowest, self.edges)])

    def _share(self, seconds: list[float]) -> float:
        total = self.slowest.seconds * self.slowest.num_ranks
        return sum(seconds) / total if total else 0.0

    def __str__(self) -> str:
        """Measured beside predicted, in one line."""
        predictions = [("from the costs of this step", self.simulated)]
        if self.planned is not None:
            predictions.append(("by the plan", self.planned))
        told = [
            f"{name} {_seconds(each.seconds)} ({_error(each.seconds, self.slowest.seconds)}), bubble "
            f"{_percent(each.bubble_fraction)}"
            for name, each in predictions
        ]
        worth_telling = self.sums_s > 1e-3 * self.slowest.seconds
        sums = f" {_seconds(self.sums_s)} more went by for sums of gradients." if worth_telling else ""
        return (
            f"step {self.step + 1} took {_seconds(self.slowest.seconds)}, of which ranks waited "
            f"{_percent(self.bubble)} for each other and {_percent(self.exposed)} for transfers and the runtime; "
            f"predicted {', '.join(told)}.{sums}"
        )

    def to_json(self) -> str:
        """JSON text, timelines as `Timeline.to_json` writes them; the inverse of `from_json`."""
        values = {
            "step": self.step,
            "layout": self.layout,
            "sums_s": self.sums_s,
            "clock_error_s": self.clock_error_s,
            "schedule": json.loads(self.schedule.to_json()),
            "edges": sorted(self.edges),
            "measured": [json.loads(timeline.to_json()) for timeline in self.measured],
            "planned": None if self.planned is None else json.loads(self.planned.to_json()),
            "simulated": json.loads(self.simulated.to_json()),
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Recording:
        """The recording that `to_json` wrote. Raises ScheduleError."""
        try:
            values: dict[str, Any] = json.loads(text)
            planned = values["planned"]
            return cls(
                step=int(values["step"]),
                layout=str(values["layout"]),
                schedule=Schedule.from_json(json.dumps(values["schedule"])),
                edges=frozenset((int(s), int(t)) for s, t in values["edges"]),
                measured=tuple(Timeline.from_json(json.dumps(each)) for each in values["measured"]),
                planned=None if planned is None else Timeline.from_json(json.dumps(planned)),
                sums_s=float(values["sums_s"]),
                clock_error_s=float(values["clock_error_s"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ScheduleError(
                "a recording in JSON has step, layout, schedule, edges, measured, planned, sums_s and clock_error_s, "
                f"but reading failed with {type(error).__name__}: {error}; compare with the output of Recording.to_json"
            ) from error

    @classmethod
    def read(cls, path: str | Path) -> Recording:
        """The recording in a file. Raises ScheduleError that names it."""
        text = read_text(path, what="a recorded step", repair="train on with [timeline]", error=ScheduleError)
        try:
            return cls.from_json(text)
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from error

    def write(self, folder: str | Path) -> Path:
        """Keep it as a file of the folder, by the number of its step. Returns the file."""
        path = Path(folder) / f"step-{self.step + 1:06d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path


def recordings_in(folder: str | Path) -> dict[int, Path]:
    """The files of a folder by step, as people count them: from 1. Empty where there are none."""
    found = {path.stem.removeprefix("step-"): path for path in sorted(Path(folder).glob("step-*.json"))}
    return {int(number): path for number, path in found.items() if number.isdigit()}


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %" if measured else "nothing was measured"
