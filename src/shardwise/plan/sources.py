"""Where the schedule of a layout comes from: a generator, a file, or a search; each as one callable value.

    source(num_micro_batches) -> Schedule          source.ranks[r]: the stages of place r of the pipeline

A schedule that was written or found is for one number of micro-batches. Knows names and files of schedules; refuses to
know models, and how a schedule is found.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

from shardwise.errors import LayoutError, ScheduleError
from shardwise.files import read_text
from shardwise.layout import SEARCHED, Layout
from shardwise.schedule import GENERATORS, Action, Kind, Schedule, generate, pipedream_2bw, placement
from shardwise.schedule.passes import with_offload
from shardwise.schedule.torch_csv import read_csv

__all__ = [
    "AnySource",
    "GeneratedSource",
    "GivenSource",
    "OffloadedSource",
    "ScheduleSource",
    "breadth_first",
    "check_source",
    "moves_by_schedule",
    "source_of",
]


class ScheduleSource(Protocol):
    """Gives the schedule of a step, or of an evaluation, of so many micro-batches a replica."""

    def __call__(self, num_micro_batches: int, /) -> Schedule: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedSource:
    """A schedule of GENERATORS. Raises `ScheduleError` when called, where the generator does."""

    name: str
    num_ranks: int
    chunks: int | None = None

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """[r]: the stages of place r of the pipeline."""
        return placement(self.name, num_ranks=self.num_ranks, chunks=self.chunks)

    def __call__(self, num_micro_batches: int, /) -> Schedule:
        return generate(self.name, num_ranks=self.num_ranks, num_micro_batches=num_micro_batches, chunks=self.chunks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenSource:
    """One schedule, from a file or a search. An evaluation of another number of micro-batches runs breadth first."""

    schedule: Schedule

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """[r]: the stages of place r of the pipeline."""
        return self.schedule.ranks

    def __call__(self, num_micro_batches: int, /) -> Schedule:
        if num_micro_batches == self.schedule.num_micro_batches:
            return self.schedule
        return breadth_first(self.ranks, num_micro_batches)


AnySource = GeneratedSource | GivenSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadedSource:
    """Another source's schedules, with what forwards keep moved to the host and back (`schedule.passes`); those that
    move something themselves stay as they are. A load stands up to two actions ahead of its use; where a stage's
    backwards follow too soon for that, one, or none."""

    source: AnySource

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """[r]: the stages of place r of the pipeline."""
        return self.source.ranks

    def __call__(self, num_micro_batches: int, /) -> Schedule:
        made = self.source(num_micro_batches)
        if any(isinstance(each, Action) and each.kind is Kind.O for row in made.actions for each in row):
            return made
        for stage in range(made.num_stages):
            made = _moved_early(made, stage)
        return made


def breadth_first(ranks: tuple[tuple[int, ...], ...], num_micro_batches: int) -> Schedule:
    """Every stage runs all micro-batches forward, the lowest stage of a rank first, then all backward, the highest
    first: right for any stages of any ranks (arXiv:2211.05953)."""

    def row(stages: tuple[int, ...]) -> tuple[Action, ...]:
        there = [(Kind.F, stage) for stage in sorted(stages)]
        back = [(Kind.B, stage) for stage in sorted(stages, reverse=True)]
        return tuple(
            Action(kind=kind, stage=stage, micro_batch=m)
            for kind, stage in (*there, *back)
            for m in range(num_micro_batches)
        )

    return Schedule(
        name="breadth-first",
        num_stages=sum(map(len, ranks)),
        num_micro_batches=num_micro_batches,
        ranks=ranks,
        actions=tuple(map(row, ranks)),
    )


def _moved_early(schedule: Schedule, stage: int) -> Schedule:
    for distance in (2, 1, 0):
        moved = with_offload(schedule, (stage,), distance=distance)
        if moved != schedule:
            return moved
    return schedule


def moves_by_schedule(layout: Layout) -> bool:
    """Whether activations of the layout go to the host when its schedule says so: where a pipeline has forwards whose
    backwards do not follow at once. Else each unit's go when it is done."""
    flushes = layout.schedule not in GENERATORS or GENERATORS[layout.schedule].flushes
    return layout.offloads_activations and layout.pp > 1 and flushes


def source_of(layout: Layout) -> AnySource | None:
    """Where the layout's schedule comes from; None where it has to be searched for.

    Reads the layout's schedule file. Raises `LayoutError` where that cannot be read, or is one for other ranks or
    stages.
    """
    if layout.schedule == SEARCHED:
        return None
    if not layout.reads_schedule:
        return GeneratedSource(name=layout.schedule, num_ranks=layout.pp, chunks=layout.chunks)
    return GivenSource(schedule=_read(layout))


def check_source(layout: Layout, num_micro_batches: int) -> None:
    """That the layout's schedule is there for so many micro-batches a replica: to be asked before ranks are started.

    Raises `LayoutError` with the numbers.
    """
    source = source_of(layout)
    if isinstance(source, GeneratedSource):
        try:
            if not GENERATORS[source.name].flushes:
                _check_flushed(layout)
                pipedream_2bw.check_micro_batches(num_ranks=layout.pp, num_micro_batches=num_micro_batches)
            source(num_micro_batches)
        except ScheduleError as error:
            raise LayoutError(f"{layout} with {num_micro_batches} micro-batches: {error}") from error
    elif source is not None and source.schedule.num_micro_batches != num_micro_batches:
        written = source.schedule.num_micro_batches
        raise LayoutError(
            f"a schedule in a file is for one number of micro-batches, but {layout.schedule} is for {written} and a "
            f"replica has {num_micro_batches}; set micro_batches={written} (with that many samples a replica or more), "
            "or write another file"
        )


def _check_flushed(layout: Layout) -> None:
    for axis, size in (("fsdp", layout.fsdp), ("cp", layout.cp)):
        if size > 1:
            raise LayoutError(
                f"steps of {layout.schedule} overlap, and {axis} is for steps that end by themselves, but {axis}="
                f"{size}; use another schedule, or {axis}=1"
            )
    if layout.ep > 1:
        raise LayoutError(
            f"what experts do is counted step by step, and steps of {layout.schedule} overlap, but ep={layout.ep}; use "
            "another schedule, or ep=1"
        )


def _read(layout: Layout) -> Schedule:
    path = Path(layout.schedule)
    text = read_text(path, what="a schedule file", repair="correct the path", error=LayoutError)
    try:
        schedule = read_csv(text, name=path.stem) if path.suffix == ".csv" else Schedule.from_json(text)
    except ScheduleError as error:
        raise LayoutError(f"{path}: {error}") from error
    if schedule.num_ranks != layout.pp or schedule.num_stages != layout.num_stages:
        chunks = schedule.num_stages // schedule.num_ranks
        raise LayoutError(
            f"a schedule file is for the ranks and stages of its layout, but {path} has {schedule.num_stages} stages "
            f"on {schedule.num_ranks} ranks and {layout} has {layout.num_stages} on {layout.pp}; write "
            f"pp={schedule.num_ranks}{f',chunks={chunks}' if chunks > 1 else ''}"
        )
    return schedule
