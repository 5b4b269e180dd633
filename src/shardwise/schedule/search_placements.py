"""Searches which rank owns which stages together with the schedule: for unequal devices, heavy stages, scarce memory.

A generator gives every rank as many stages as every other. Here a rank may own any: few on a slow device, few beside a
heavy head. A placement is judged by its lower bound, then by what a handful of rules make of it; the best are searched
in full. It knows neither modules nor layouts: stages are given, with what they cost on a device of speed 1.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

from shardwise.errors import ScheduleError
from shardwise.schedule.bounds import lower_bound
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges, checked
from shardwise.schedule.list_scheduler import dispatch
from shardwise.schedule.longest_path import times_of
from shardwise.schedule.memory import Memory
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.policies import first_policies
from shardwise.schedule.problem import Problem
from shardwise.schedule.search import Searched, has_room, search

__all__ = ["Ranks", "on_devices", "search_placements"]

Ranks = tuple[tuple[int, ...], ...]
RULES = 12  # that a placement is judged by
FULL = 3  # placements, of those that no generator has, that are searched in full
SHARE_OF_JUDGING = 0.4  # of the budget


def on_devices(costs: Costs, ranks: Ranks, speeds: Sequence[float] | None) -> Costs:
    """`costs`, of stages on a device of speed 1, where rank r runs at `speeds[r]`."""
    if speeds is None:
        return costs
    speed_of = {s: speeds[r] for r, stages in enumerate(ranks) for s in stages}
    compute = {
        kind: tuple(x / speed_of[s] for s, x in enumerate(seconds)) for kind, seconds in costs.compute_seconds.items()
    }
    return replace(costs, compute_seconds=compute)


def search_placements(
    costs: Costs,
    *,
    num_micro_batches: int,
    num_ranks: int,
    speeds: Sequence[float] | None = None,
    edges: Edges | None = None,
    memory: Memory | None = None,
    seconds: float = 10.0,
    seed: int = 0,
) -> Searched:
    """The fastest schedule found of any placement: `schedule.ranks` says which rank owns which stages.

    costs: of stages on a device of speed 1; rank r computes `speeds[r]` times as fast (all 1 if not given). Never
    slower than any generator on as many stages that fits `memory`. Raises ScheduleError if there are fewer stages than
    ranks, a speed is not positive, or no placement was found that has room for a micro-batch.
    """
    num_stages = len(next(iter(costs.compute_seconds.values()), ()))
    _check(num_stages, num_ranks, speeds)
    edges = checked(edges, num_stages)
    world = _World(costs, edges, num_micro_batches, num_ranks, speeds, memory)
    chance = random.Random(seed)
    known = [ranks for ranks in _of_generators(num_stages, num_ranks) if world.judge(ranks) < math.inf]
    for ranks in (_in_a_row(costs, num_ranks, speeds), *_at_random(num_stages, num_ranks, chance, 4)):
        world.judge(ranks)
    world.improve(chance, until_s=time.monotonic() + SHARE_OF_JUDGING * seconds)
    others = [ranks for ranks in world.best(FULL + len(known)) if ranks not in known][:FULL]
    chosen = [*known, *others]
    if not chosen:
        raise ScheduleError(
            f"none of {len(world.judged)} placements of {num_stages} stages on {num_ranks} ranks has room for one "
            "micro-batch on every rank; raise the limits, or cut the model into more stages"
        )
    shares = [0.5 / len(known) if ranks in known and others else 1.0 / len(chosen) for ranks in chosen]
    found = [
        search(
            on_devices(costs, ranks, speeds),
            num_micro_batches=num_micro_batches,
            ranks=ranks,
            edges=edges,
            memory=memory,
            seconds=(1 - SHARE_OF_JUDGING) * seconds * share,
            seed=seed,
        )
        for ranks, share in zip(chosen, shares, strict=True)
    ]
    best = min(found, key=lambda one: one.seconds)
    textbooks = [one.best_textbook for one in found if one.best_textbook is not None]
    return replace(best, best_textbook=min(textbooks, key=lambda pair: pair[1], default=None))


@dataclass
class _World:
    """What placements have been judged, and how well they did."""

    costs: Costs
    edges: Edges
    num_micro_batches: int
    num_ranks: int
    speeds: Sequence[float] | None
    memory: Memory | None

    def __post_init__(self) -> None:
        self.judged: dict[Ranks, float] = {}

    def judge(self, ranks: Ranks) -> float:
        """Seconds by the best of some rules; infinite without room, or where the bound says that it cannot be best."""
        if ranks not in self.judged:
            self.judged[ranks] = self._judge(ranks)
        return self.judged[ranks]

    def best(self, count: int) -> list[Ranks]:
        ordered = sorted(self.judged, key=lambda ranks: (self.judged[ranks], ranks))
        return [ranks for ranks in ordered[:count] if self.judged[ranks] < math.inf]

    def _judge(self, ranks: Ranks) -> float:
        problem = Problem.of(
            on_devices(self.costs, ranks, self.speeds),
            self.edges,
            num_micro_batches=self.num_micro_batches,
            ranks=ranks,
            memory=self.memory,
        )
        if not has_room(problem):
            return math.inf
        third = sorted(self.judged.values())[2:3]
        if max(map(problem.load, range(self.num_ranks))) >= min(third, default=math.inf):
            return math.inf
        if lower_bound(problem) >= min(third, default=math.inf):
            return math.inf
        found = (times_of(problem, dispatch(problem, policy)) for policy in islice(first_policies(problem), RULES))
        return min(times.seconds for times in found if times is not None)

    def improve(self, chance: random.Random, until_s: float) -> None:
        """Moves stages between ranks, from the best placements so far."""
        tried = 0
        while time.monotonic() < until_s and tried < 200 * self.num_ranks:
            best = self.best(4)
            if not best:
                return
            tried += 1
            self.judge(_moved(best[int(chance.random() ** 2 * len(best))], chance))


def _moved(ranks: Ranks, chance: random.Random) -> Ranks:
    """One stage to another rank, or two stages swapped, once or twice."""
    owned = [list(stages) for stages in ranks]
    for _ in range(chance.choice((1, 1, 2))):
        source, target = chance.sample(range(len(owned)), 2) if len(owned) > 1 else (0, 0)
        given = owned[source].pop(chance.randrange(len(owned[source])))
        owned[target].append(given)
        if not owned[source] or chance.random() < 0.5:
            back = chance.choice([s for s in owned[target] if s != given] or [given])
            owned[target].remove(back)
            owned[source].append(back)
    return tuple(tuple(sorted(stages)) for stages in owned) if all(owned) else ranks


def _of_generators(num_stages: int, num_ranks: int) -> Iterator[Ranks]:
    """A loop, and a V, if every rank gets as many stages."""
    chunks, rest = divmod(num_stages, num_ranks)
    if not rest:
        yield stages_of_ranks(Placement.LOOP, num_ranks=num_ranks, chunks=chunks)
        if chunks > 1 and num_ranks > 1:
            yield stages_of_ranks(Placement.V, num_ranks=num_ranks, chunks=chunks)


def _in_a_row(costs: Costs, num_ranks: int, speeds: Sequence[float] | None) -> Ranks:
    """Consecutive stages, the most loaded rank loaded as little as can be (by bisection)."""
    each = [sum(x) for x in zip(*costs.compute_seconds.values(), strict=True)]
    speed = list(speeds or [1.0] * num_ranks)
    low, high = 0.0, sum(each) / min(speed)
    best: Ranks | None = None
    for _ in range(40):
        limit = (low + high) / 2
        found = _filled(each, speed, limit)
        if found is None:
            low = limit
        else:
            best, high = found, limit
    return (
        best
        if best is not None
        else tuple((s,) for s in range(num_ranks - 1)) + (tuple(range(num_ranks - 1, len(each))),)
    )


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
