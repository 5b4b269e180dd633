"""Searches which rank owns which stages together with the schedule: for unequal devices, heavy stages, scarce memory.

A generator gives every rank as many stages as every other. Here a rank may own any: few on a slow device, few beside a
heavy head. A placement is judged by its lower bound, then by what a handful of rules make of it; the best are searched
in full. It knows neither modules nor layouts: stages are given, with what they cost on a device of speed 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from shardwise.errors import ScheduleError
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges, checked
from shardwise.schedule.memory import Memory
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.placement_judge import FULL, Judge, Ranks, on_devices, seconds_each
from shardwise.schedule.problem import Problem
from shardwise.schedule.search import Searched, search

__all__ = ["on_devices", "search_placements"]

SHARE_OF_JUDGING = 0.4  # of the budget


def search_placements(
    costs: Costs,
    *,
    num_micro_batches: int,
    num_ranks: int,
    speeds: Sequence[float] | None = None,
    edges: Edges | None = None,
    memory: Memory | None = None,
    held_bytes: Sequence[float] | None = None,
    seconds: float = 10.0,
    seed: int = 0,
) -> Searched:
    """The fastest schedule found of any placement: `schedule.ranks` says which rank owns which stages.

    costs: of stages on a device of speed 1; rank r computes `speeds[r]` times as fast (all 1 if not given). Never
    slower than any generator on as many stages that fits `memory`, whose limits also have to hold what each stage keeps
    throughout, `held_bytes[s]` (weights, gradients, optimizer state). Raises ScheduleError if there are fewer stages
    than ranks, a speed is not positive, or no placement was found that has room for a micro-batch.
    """
    num_stages = len(next(iter(costs.compute_seconds.values()), ()))
    _check(num_stages, num_ranks, speeds)
    if held_bytes is not None and len(held_bytes) != num_stages:
        raise ScheduleError(
            f"held_bytes are given for each of {num_stages} stages, but there are {len(held_bytes)}; give one a stage"
        )
    edges = checked(edges, num_stages)
    Problem.of(
        costs, edges, num_micro_batches=num_micro_batches, ranks=[range(num_stages)], memory=None
    )  # checks costs
    judge = Judge(
        costs=costs,
        edges=edges,
        num_micro_batches=num_micro_batches,
        num_ranks=num_ranks,
        speeds=speeds,
        memory=memory,
        held_bytes=held_bytes,
    )
    chance = random.Random(seed)
    known = [ranks for ranks in _of_generators(num_stages, num_ranks) if judge.judge(ranks) < math.inf]
    for ranks in (_in_a_row(costs, num_ranks, speeds), *_at_random(num_stages, num_ranks, chance, 4)):
        judge.judge(ranks)
    judge.improve(chance, seconds=SHARE_OF_JUDGING * seconds)
    others = [ranks for ranks in judge.best(FULL + len(known)) if ranks not in known][:FULL]
    if not (known or others):
        raise ScheduleError(
            f"none of {len(judge.judged)} placements of {num_stages} stages on {num_ranks} ranks has room for one "
            "micro-batch on every rank; raise the limits, or cut the model into more stages"
        )
    half = 0.5 if known and others else 1.0  # for either kind
    found = [
        search(
            on_devices(costs, ranks, speeds),
            num_micro_batches=num_micro_batches,
            ranks=ranks,
            edges=edges,
            memory=judge.memory_of(ranks),
            seconds=(1 - SHARE_OF_JUDGING) * seconds * half / len(alike),
            seed=seed,
        )
        for alike in (known, others)
        for ranks in alike
    ]
    best = min(found, key=lambda one: one.seconds)
    textbooks = [one.best_textbook for one in found if one.best_textbook is not None]
    return replace(best, best_textbook=min(textbooks, key=lambda pair: pair[1], default=None))


def _of_generators(num_stages: int, num_ranks: int) -> Iterator[Ranks]:
    """A loop, and a V, if every rank gets as many stages."""
    chunks, rest = divmod(num_stages, num_ranks)
    if not rest:
        yield stages_of_ranks(Placement.LOOP, num_ranks=num_ranks, chunks=chunks)
        if chunks > 1 and num_ranks > 1:
            yield stages_of_ranks(Placement.V, num_ranks=num_ranks, chunks=chunks)


def _in_a_row(costs: Costs, num_ranks: int, speeds: Sequence[float] | None) -> Ranks:
    """Consecutive stages, the most loaded rank loaded as little as can be (by bisection)."""
    each = seconds_each(costs)
    speed = list(speeds or [1.0] * num_ranks)
    low, high = 0.0, sum(each) / min(speed)
    best = _filled(each, speed, high)
    assert best is not None  # all that is left fits on the last rank
    for _ in range(40):
        limit = (low + high) / 2
        found = _filled(each, speed, limit)
        if found is None:
            low = limit
        else:
            best, high = found, limit
    return best


def _filled(each: Sequence[float], speed: Sequence[float], limit: float) -> Ranks | None:
    """Rank by rank as many stages as fit in `limit` seconds, each rank one at least; None if some are left."""
    ranks, start, sums = [], 0, [0.0, *accumulate(each)]
    for r, s in enumerate(speed):
        most = len(each) - (len(speed) - r - 1)  # leave one for each that follows
        end = start
        while end < most and (sums[end + 1] - sums[start]) / s <= limit:
            end += 1
        if end == start:
            return None
        ranks.append(tuple(range(start, end)))
        start = end
    return tuple(ranks) if start == len(each) else None


def _at_random(num_stages: int, num_ranks: int, chance: random.Random, count: int) -> Iterator[Ranks]:
    for _ in range(count):
        owners = [*range(num_ranks), *(chance.randrange(num_ranks) for _ in range(num_stages - num_ranks))]
        chance.shuffle(owners)
        yield tuple(tuple(s for s, owner in enumerate(owners) if owner == r) for r in range(num_ranks))


def _check(num_stages: int, num_ranks: int, speeds: Sequence[float] | None) -> None:
    if not 1 <= num_ranks <= num_stages:
        raise ScheduleError(
            f"every rank owns a stage, but there are {num_ranks} ranks and {num_stages} stages; use fewer ranks or cut "
            "the model into more stages"
        )
    if speeds is not None and (len(speeds) != num_ranks or not all(s > 0 and math.isfinite(s) for s in speeds)):
        raise ScheduleError(
            f"each of {num_ranks} ranks has a speed above 0, but speeds are {list(speeds)}; 1 is the device that the "
            "costs are for, 0.5 one that takes twice as long"
        )
