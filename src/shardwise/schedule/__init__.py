"""Schedules: who computes what in which order; generated, checked, simulated and drawn as pure values.

A schedule knows neither layouts nor modules. To add one, see `generators`.
"""

from __future__ import annotations

from shardwise.schedule.about import About
from shardwise.schedule.actions import (
    Action,
    Kind,
    StageAction,
    StageKind,
    Transfer,
    TransferKind,
    parse,
    parse_row,
    print_row,
)
from shardwise.schedule.check import Check, check
from shardwise.schedule.costs import Costs
from shardwise.schedule.draw import draw
from shardwise.schedule.generators import GENERATORS, Family, Generator, chunks_of, generate, placement
from shardwise.schedule.graph import Edge, Edges, chain
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule, forward_only
from shardwise.schedule.simulate import seconds_of, simulate
from shardwise.schedule.spans import Span
from shardwise.schedule.timeline import Timeline
from shardwise.schedule.transfers import Row, with_transfers

__all__ = [
    "GENERATORS",
    "About",
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
    "StageAction",
    "StageKind",
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
    "seconds_of",
    "simulate",
    "stages_of_ranks",
    "with_transfers",
]
