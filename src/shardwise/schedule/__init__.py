"""Schedules: who computes what in which order; generated, checked, simulated and drawn as pure values.

A schedule knows neither layouts nor modules. To add one, write a file with a `generate` and add its line
below.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from shardwise.errors import ScheduleError
from shardwise.schedule import gpipe, naive, one_f_one_b
from shardwise.schedule.actions import Action, Kind, Transfer, TransferKind, parse, parse_row, print_row
from shardwise.schedule.check import Check, check
from shardwise.schedule.costs import Costs
from shardwise.schedule.draw import draw
from shardwise.schedule.graph import Edge, Edges, chain
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
    "Generator",
    "Kind",
    "Row",
    "Schedule",
    "Span",
    "Timeline",
    "Transfer",
    "TransferKind",
    "chain",
    "check",
    "draw",
    "forward_only",
    "generate",
    "parse",
    "parse_row",
    "print_row",
    "simulate",
    "with_transfers",
]


class Generator(Protocol):
    """A pure function that makes a schedule for any stage graph whose stages are numbered topologically."""

    def __call__(self, *, num_stages: int, num_micro_batches: int) -> Schedule: ...


GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        "naive": naive.generate,
        "gpipe": gpipe.generate,
        "1f1b": one_f_one_b.generate,
    }
)


def generate(name: str, *, num_stages: int, num_micro_batches: int) -> Schedule:
    """The schedule of that name in GENERATORS. Raises ScheduleError if there is none or a count is 0."""
    if name not in GENERATORS:
        raise ScheduleError(f'a schedule is one of {", ".join(GENERATORS)}, but got "{name}"; use one of these')
    return GENERATORS[name](num_stages=num_stages, num_micro_batches=num_micro_batches)
