"""How good it is that these ranks own those stages: by a lower bound, then by what a handful of rules make of it.

Most placements are told apart by the load of their fullest rank alone. It knows which placements were judged, and how
to change one a little; which are searched in full is decided elsewhere.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from shardwise.schedule.actions import Kind
from shardwise.schedule.bounds import lower_bound
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges
from shardwise.schedule.list_scheduler import dispatch
from shardwise.schedule.longest_path import times_of
from shardwise.schedule.memory import Memory
from shardwise.schedule.policies import first_policies
from shardwise.schedule.problem import Problem
from shardwise.schedule.search import VISITS_OF_DISPATCH, VISITS_PER_SECOND

__all__ = ["FULL", "Judge", "Ranks", "on_devices", "seconds_each"]

Ranks = tuple[tuple[int, ...], ...]
RULES, BEST_RULES = 12, 4  # that the first placement is judged by, and how many of them judge the others
FULL = 3  # placements, of those that no generator has, that are searched in full


def on_devices(costs: Costs, ranks: Ranks, speeds: Sequence[float] | None) -> Costs:
    """`costs`, of stages on a device of speed 1, where rank r runs at `speeds[r]`."""
    if speeds is None:
        return costs
    speed_of = {s: speeds[r] for r, stages in enumerate(ranks) for s in stages}
    compute = {
        kind: tuple(x / speed_of[s] for s, x in enumerate(seconds)) for kind, seconds in costs.compute_seconds.items()
    }
    return replace(costs, compute_seconds=compute)


def seconds_each(costs: Costs) -> list[float]:
    """[stage]: forward and backward of one micro-batch, whole or split, whichever is cheaper."""
    kinds = (costs.compute_seconds[kind] for kind in (Kind.F, Kind.B, Kind.I, Kind.W))
    return [f + min(b, i + w) for f, b, i, w in zip(*kinds, strict=True)]


@dataclass(kw_only=True)
class Judge:
    """What placements have been judged, and how well they did."""

    costs: Costs
    edges: Edges
    num_micro_batches: int
    num_ranks: int
    speeds: Sequence[float] | None
    memory: Memory | None
    held_bytes: Sequence[float] | None

    def __post_init__(self) -> None:
        self.judged: dict[Ranks, float] = {}
        self.lacking: dict[Ranks, float] = {}  # of those without room: by how much the fullest rank is too full
        self.rules = list(range(RULES))  # in the order of the grid

    def memory_of(self, ranks: Ranks) -> Memory | None:
        """What the limits leave for activations beside what the stages hold throughout."""
        memory, held = self.memory, self.held_bytes
        if memory is None or held is None or memory.limit_bytes is None:
            return memory
        left = [memory.limit_of(r) - sum(held[s] for s in own) for r, own in enumerate(ranks)]
        return replace(memory, limit_bytes=tuple(None if x == math.inf else max(0.0, x) for x in left))

    def _lacking(self, ranks: Ranks) -> float:
        """By how much the fullest rank is too full with one micro-batch; 0 if all have room."""
        memory, held = self.memory, self.held_bytes
        if memory is None:
            return 0.0
        each = [max(a, w) for a, w in zip(memory.activation_bytes, memory.weight_bytes, strict=True)]
        if held is not None:
            each = [kept + more for kept, more in zip(each, held, strict=True)]
        return max(0.0, *(sum(each[s] for s in own) - memory.limit_of(r) * (1 + 1e-9) for r, own in enumerate(ranks)))

    def judge(self, ranks: Ranks) -> float:
        """Seconds by the best of some rules; infinite without room, or where the bound says that it cannot be best."""
        if ranks not in self.judged:
            self.judged[ranks] = self._judge(ranks)
        return self.judged[ranks]

    def best(self, count: int) -> list[Ranks]:
        ordered = sorted(self.judged, key=lambda ranks: (self.judged[ranks], ranks))
        return [ranks for ranks in ordered[:count] if self.judged[ranks] < math.inf]

    def _judge(self, ranks: Ranks) -> float:
        lacking = self._lacking(ranks)
        if lacking > 0:
            self.lacking[ranks] = lacking
            return math.inf
        problem = Problem.of(
            on_devices(self.costs, ranks, self.speeds),
            self.edges,
            num_micro_batches=self.num_micro_batches,
            ranks=ranks,
            memory=self.memory_of(ranks),
        )
        to_beat = self._to_beat()
        if max(map(problem.load, range(self.num_ranks))) >= to_beat or lower_bound(problem) >= to_beat:
            return math.inf
        policies = list(islice(first_policies(problem), RULES))
        found = []
        for rule in self.rules:
            if rule < len(policies) and (times := times_of(problem, dispatch(problem, policies[rule]))) is not None:
                found.append((times.seconds, rule))
        if len(self.rules) == RULES:
            self.rules = sorted(rule for _, rule in sorted(found)[:BEST_RULES])
        return min(found, default=(math.inf, 0))[0]

    def _to_beat(self) -> float:
        """Seconds of the last placement that would be searched in full."""
        return min(sorted(self.judged.values())[FULL - 1 : FULL], default=math.inf)

    def improve(self, chance: random.Random, *, seconds: float) -> None:
        """Moves stages between ranks, from the best placements so far: as often as fits in so many seconds."""
        stop_s = time.monotonic() + seconds
        num_stages = sum(map(len, next(iter(self.judged))))
        visits = VISITS_OF_DISPATCH * BEST_RULES * 3 * num_stages * self.num_micro_batches
        before = len(self.judged)
        for _ in range(200 * self.num_ranks):
            if len(self.judged) - before > seconds * VISITS_PER_SECOND / visits or time.monotonic() > stop_s:
                return
            best = self.best(4) or sorted(self.lacking, key=lambda ranks: (self.lacking[ranks], ranks))[:4]
            ranks = _moved(best[int(chance.random() ** 2 * len(best))], chance)
            if self._load(ranks) < self._to_beat():
                self.judge(ranks)

    def _load(self, ranks: Ranks) -> float:
        """Seconds of the most loaded rank."""
        each = seconds_each(self.costs)
        factors = self.costs.micro_batch_factors
        times = sum(factors) if factors else self.num_micro_batches
        speeds = self.speeds or [1.0] * len(ranks)
        return times * max(sum(each[s] for s in own) / speeds[r] for r, own in enumerate(ranks))


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
