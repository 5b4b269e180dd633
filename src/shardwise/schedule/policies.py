"""The rules that a search starts from, and how it changes them a little.

Each is a point of a grid: which kind of action is preferred, how many forwards may be ahead of their backward
(as in 1F1B, in the zero-bubble schedules, as many as a round trip takes, or any number), how many weight gradients may
be put off, and how patient a rank is. It knows no rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from shardwise.schedule.list_scheduler import Policy
from shardwise.schedule.problem import FORWARD, INPUT, Problem

__all__ = ["changed", "first_policies"]

PATIENCE = (0.0, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class _Paths:
    """Of a micro-batch alone on all ranks: when each stage's forward and backward start; the busiest rank's share."""

    forwards: tuple[float, ...]
    backwards: tuple[float, ...]
    period: float  # seconds a micro-batch

    @classmethod
    def of(cls, problem: Problem) -> _Paths:
        n = problem.num_stages
        forwards, backwards = [0.0] * n, [0.0] * n
        for s in range(n):
            sources = problem.forward_sources[s]
            forwards[s] = max((forwards[t] + problem.seconds[FORWARD][t] + lag for t, lag in sources), default=0.0)
        for s in reversed(range(n)):
            sources = problem.backward_sources[s]
            own = forwards[s] + problem.seconds[FORWARD][s]
            backwards[s] = max((backwards[t] + problem.seconds[INPUT][t] + lag for t, lag in sources), default=own)
        period = max(map(problem.load, range(len(problem.ranks)))) / problem.num_micro_batches
        return cls(forwards=tuple(forwards), backwards=tuple(backwards), period=max(period, 1e-12))


def first_policies(problem: Problem) -> Iterator[Policy]:
    """The grid, the most promising first: weight gradients put off as they come, then at once, then whole backwards."""
    paths = _Paths.of(problem)
    n, most = problem.num_stages, problem.num_micro_batches
    unsplit = tuple(not splits for splits in problem.splits)
    dearer = any(i + w > b for _, i, w, b in zip(*problem.seconds, strict=True))
    ways = [(unsplit, most)]
    if not all(unsplit):
        ways.extend([(unsplit, 1), (unsplit, 0)])
        if dearer:
            ways.append(((True,) * n, most))
    rules = product(ways, PATIENCE, _caps(problem, paths), _urgencies(problem, paths))
    for (whole, late), patience, ahead, (base, slope) in rules:
        yield Policy(base=base, slope=slope, ahead=ahead, put_off=(late,) * n, whole=whole, patience=patience)


def changed(policy: Policy, problem: Problem, chance: random.Random) -> Policy:
    """The policy with one to three of its numbers changed at random."""
    period = max(map(problem.load, range(len(problem.ranks)))) / problem.num_micro_batches
    for _ in range(chance.randint(1, 3)):
        match chance.randrange(5):
            case 0:
                policy = replace(policy, ahead=_nudged(policy.ahead, problem.num_micro_batches, chance, lowest=1))
            case 1:
                policy = replace(policy, put_off=_nudged(policy.put_off, problem.num_micro_batches, chance, lowest=0))
            case 2:
                policy = replace(policy, patience=chance.choice((0.0, 0.25, 0.5, 0.75, 1.0)))
            case 3:
                base = list(policy.base)
                base[chance.randrange(len(base))] += chance.gauss(0, 1) * period
                policy = replace(policy, base=tuple(base))
            case _:
                s = chance.randrange(problem.num_stages)
                if problem.splits[s]:
                    whole = [*policy.whole[:s], not policy.whole[s], *policy.whole[s + 1 :]]
                    policy = replace(policy, whole=tuple(whole))
    return policy


def _nudged(numbers: Sequence[int], most: int, chance: random.Random, *, lowest: int) -> tuple[int, ...]:
    """One number, or all of them, one up or down within bounds."""
    step = chance.choice((-1, 1))
    chosen = range(len(numbers)) if chance.random() < 0.3 else (chance.randrange(len(numbers)),)
    return tuple(min(most, max(lowest, x + step)) if s in chosen else x for s, x in enumerate(numbers))


def _urgencies(problem: Problem, paths: _Paths) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """(base, slope) by rules: target times of a steady flow; backward first, forwards deep first or in turn."""
    n, period = problem.num_stages, paths.period
    far = 1e3 * period * (problem.num_micro_batches + n)
    steady = (*paths.forwards, *paths.backwards, *(x + far for x in paths.backwards), *paths.backwards)
    slope = (period,) * (4 * n)
    backs = tuple(-far - x for x in paths.backwards)
    weights = tuple(far - x for x in paths.backwards)
    deep = (*(-x for x in paths.forwards), *backs, *weights, *backs)
    old_first = (*(x * 1e-6 for x in paths.forwards), *(-far for _ in range(n)), *weights, *(-far for _ in range(n)))
    rules = [(steady, slope), (old_first, slope)]
    if any(len(stages) > 1 for stages in problem.ranks):
        rules.append((deep, (period * 1e-3,) * (4 * n)))
        rules.append(((*paths.forwards, *(x - far for x in paths.backwards), *weights, *backs), slope))
    return rules


def _caps(problem: Problem, paths: _Paths) -> list[tuple[int, ...]]:
    """Forwards ahead of their backward, a stage each: round trips in periods, and more, up to any number."""
    most = problem.num_micro_batches
    trips = [(b - f) / paths.period for f, b in zip(paths.forwards, paths.backwards, strict=True)]
    found: list[tuple[int, ...]] = []
    for factor, more in ((2, 1), (1, 2), (1.5, 1), (1, 1), (1, 0)):
        found.append(tuple(min(most, max(1, math.ceil(factor * trip) + more)) for trip in trips))
    n = problem.num_stages
    found.append((most,) * n)
    found.extend(tuple(min(most, k * (n - s - 1) + 1) for s in range(n)) for k in (1, 2))  # 1F1B's, ZB-H2's
    return list(dict.fromkeys(found))
