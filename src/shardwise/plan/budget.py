"""Recompute by bytes instead of everywhere: of a layout that computes again, as much as its devices have no room for.

    recompute=full      every unit again, and memory left over
    recompute=21430MiB  units are chosen, so that a rank keeps that much at most (`plan.recompute`), and uses all of it

What is left for activations follows from the memory lines of the layout that computes nothing again; what its price
then lacks is taken off. Knows prices; refuses to know which units are chosen.
"""

from __future__ import annotations

import dataclasses

from shardwise.errors import ShardwiseError
from shardwise.plan.pricer import Pricer
from shardwise.plan.ranked import Ranked
from shardwise.plan.room import most_bytes

__all__ = ["within_budget"]

_TRIES = 4
_LEAST = 1 << 10  # bytes that are worth counting
_MIB = 1 << 20


def within_budget(ranked: Ranked, pricer: Pricer) -> Ranked | None:
    """The same layout with its recompute in bytes, simulated; None where it is not to be had, or is no faster."""
    layout = ranked.layout
    if layout.recompute not in ("selective", "full") or not pricer.limits.budgets:
        return None
    budget = _left(pricer(dataclasses.replace(layout, recompute="none"), exact=True), pricer)
    for _ in range(_TRIES):
        if budget < _LEAST:
            return None
        try:
            found = pricer(dataclasses.replace(layout, recompute=_written(budget)), exact=True)
        except ShardwiseError:  # even if all is computed again, a rank keeps more
            return None
        if found.has_room:
            return found if found.price.step_s < ranked.price.step_s else None
        missing = most_bytes(found.peak_bytes + found.room_bytes) - found.peak_bytes
        budget += 1.05 * missing  # which is below 0
    return None


def _left(none: Ranked, pricer: Pricer) -> float:
    """For activations, and for the unit that is whole in its backward, on the place that has least."""
    slack = 1.0 + pricer.cluster.overheads.slack
    memory = none.peak_bytes + none.room_bytes
    besides = (lines.total - slack * (lines.activations + lines.transient) for lines in none.price.memory)
    return min((most_bytes(memory) - other) / slack for other in besides)


def _written(budget: float) -> str:
    """Whole MiB, or bytes where there are few."""
    return f"{int(budget) // _MIB}MiB" if budget >= 64 * _MIB else f"{int(budget)}B"
