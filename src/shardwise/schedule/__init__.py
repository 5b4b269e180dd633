"""Schedules: who computes what in which order; generated, checked, simulated and drawn as pure values.

A schedule knows neither layouts nor modules. To add one, write a file with a `generate` and add its `Family`
below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from shardwise.errors import ScheduleError
from shardwise.schedule import gpipe, naive, one_f_one_b
from shardwise.schedule.actions import Action, Kind, Transfer, TransferKind, parse, parse_row, print_row
from shardwise.schedule.check import Check, check
from shardwise.schedule.costs import Costs
from shardwise.schedule.draw import draw
from shardwise.schedule.graph import Edge, Edges, chain
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule, forward_only
from shardwise.schedule.simulate import simulate
from shardwise.schedule.timeline import Span, Timeline
from shardwise.schedule.transfers import Row, with_transfers

__all__ = [
    "GENERATORS",
    "Action",
    "Check",
    "Costs",
    "Edge",
    "Edges",
    "Family",
    "Generator",
    "Kind",
    "Placement",
    "Row",
    "Schedule",
    "Span",
    "Timeline",
    "Transfer",
    "TransferKind",
    "chain",
    "check",
    "chunks_of",
    "draw",
    "forward_only",
    "generate",
    "parse",
    "parse_row",
    "placement",
    "print_row",
    "simulate",
    "with_transfers",
]


class Generator(Protocol):
    """A pure function that makes a schedule for any stage graph whose stages are numbered topologically."""

    def __call__(self, *, num_ranks: int, num_micro_batches: int, chunks: int) -> Schedule: ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """A schedule by name: its generator, how it lays stages over ranks, and how many stages a rank it is made for.

    chunks: (fewest, most) stages a rank; the most is None where there is no limit.
    """

    generate: Generator
    placement: Placement = Placement.LOOP
    chunks: tuple[int, int | None] = (1, 1)


GENERATORS: Mapping[str, Family] = MappingProxyType(
    {
        "naive": Family(generate=naive.generate),
        "gpipe": Family(generate=gpipe.generate),
        "1f1b": Family(generate=one_f_one_b.generate),
    }
)


def generate(name: str, *, num_ranks: int, num_micro_batches: int, chunks: int | None = None) -> Schedule:
    """The schedule of that name in GENERATORS, `chunks` stages a rank; as few as it is made for, if not given.

    Raises ScheduleError if there is none of that name, a count is 0, or it is not made for so many stages a rank.
    """
    family, chunks = _family(name), chunks_of(name, chunks)
    return family.generate(num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=chunks)


def placement(name: str, *, num_ranks: int, chunks: int | None = None) -> tuple[tuple[int, ...], ...]:
    """[r]: the stages of rank r under the schedule of that name. Raises ScheduleError as `generate` does."""
    return stages_of_ranks(_family(name).placement, num_ranks=num_ranks, chunks=chunks_of(name, chunks))


def chunks_of(name: str, chunks: int | None = None) -> int:
    """Stages a rank: `chunks`, or the fewest that the schedule is made for. Raises ScheduleError if it is not."""
    fewest, most = _family(name).chunks
    if chunks is None:
        return fewest
    if chunks < fewest or (most is not None and chunks > most):
        fits = f"{fewest}" if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise ScheduleError(
            f"the schedule {name} is made for {fits} stages a rank, but chunks={chunks}; write chunks={fewest}, or "
            "choose another schedule"
        )
    return chunks


def _family(name: str) -> Family:
    if name not in GENERATORS:
        raise ScheduleError(f'a schedule is one of {", ".join(GENERATORS)}, but got "{name}"; use one of these')
    return GENERATORS[name]
