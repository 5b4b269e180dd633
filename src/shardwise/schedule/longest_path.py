"""When the letters of a search's rows run: each as soon as its rank and its inputs are ready.

Nothing is chosen here, so the ranks are worked off in any order, each as far as it gets; one visit a letter, since a
search does this ten thousand times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardwise.schedule.problem import BACKWARD, FORWARD, INPUT, WEIGHT, Problem, Rows

__all__ = ["Times", "times_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """When a set of rows ends, and when each of its letters starts and ends: [rank][place]."""

    seconds: float
    starts: list[list[float]]
    ends: list[list[float]]


def times_of(problem: Problem, rows: Rows, *, limit: float = math.inf) -> Times | None:
    """When everything ends; None where the ranks wait for each other, or where it is plain that `limit` is passed.

    A value is there its transfer's seconds after it is made: links are never crowded and receives always posted
    in time. Where transfers are free this is what `simulate` says, to the last bit.
    """
    num_stages = problem.num_stages
    forwards: list[list[float]] = [[] for _ in range(num_stages)]  # [stage][micro_batch]: end
    backwards: list[list[float]] = [[] for _ in range(num_stages)]
    waiting: list[list[int]] = [[] for _ in range(2 * num_stages)]  # ranks that wait for a stage's F or backward
    work = _work(problem, forwards, backwards, waiting, rows)
    place, clocks = [0] * len(rows), [0.0] * len(rows)
    slack = _slack(problem, rows, limit)
    starts: list[list[float]] = [[] for _ in rows]
    ends: list[list[float]] = [[] for _ in rows]
    ready = list(range(len(rows)))[::-1]
    while ready:
        rank = ready.pop()
        row, now, begun, ended = rows[rank], clocks[rank], starts[rank], ends[rank]
        index, stop = place[rank], len(rows[rank])
        while index < stop:
            seconds, factors, output, sources, waiters = work[row[index]]
            m = len(output)
            start = now
            for values, lag, queue in sources:
                if m >= len(values):
                    queue.append(rank)
                    break
                arrived = values[m] + (lag * factors[m] if factors else lag)
                if arrived > start:
                    start = arrived
            else:
                if start > now:
                    slack[rank] -= start - now
                    if slack[rank] < 0:
                        return None
                now = start + (seconds * factors[m] if factors else seconds)
                output.append(now)
                begun.append(start)
                ended.append(now)
                if waiters:
                    ready.extend(waiters)
                    waiters.clear()
                index += 1
                continue
            break
        place[rank], clocks[rank] = index, now
    if any(index < len(row) for index, row in zip(place, rows, strict=True)):
        return None
    return Times(seconds=max(clocks), starts=starts, ends=ends)


def _slack(problem: Problem, rows: Rows, limit: float) -> list[float]:
    """[rank]: for how long it may wait and still end within the limit, by what is left to do."""
    if limit == math.inf or problem.factors:
        return [math.inf] * len(rows)
    seconds = problem.letter_seconds.__getitem__
    return [limit * (1 + 1e-9) - sum(map(seconds, row)) for row in rows]


_Work = tuple[float, list[float], list[float], list[tuple[list[float], float, list[int]]], list[int]]


def _work(
    problem: Problem,
    forwards: list[list[float]],
    backwards: list[list[float]],
    waiting: list[list[int]],
    rows: Rows,
) -> list[_Work]:
    """[letter]: seconds, factors of its micro-batches, where its ends are noted, what it reads, who waits for it."""
    n = problem.num_stages
    factors = list(problem.factors)
    late = _late_factors(problem, rows) if factors else [factors] * n
    work: list[_Work] = []
    for kind in range(4):
        for s in range(n):
            seconds = problem.seconds[kind][s]
            if kind == FORWARD:
                sources = [(forwards[t], lag, waiting[t]) for t, lag in problem.forward_sources[s]]
                work.append((seconds, factors, forwards[s], sources, waiting[s]))
            elif kind == WEIGHT:
                work.append((seconds, late[s], [], [], []))
            else:
                sources = [(backwards[t], lag, waiting[n + t]) for t, lag in problem.backward_sources[s]]
                work.append((seconds, factors, backwards[s], sources, waiting[n + s]))
    return work


def _late_factors(problem: Problem, rows: Rows) -> list[list[float]]:
    """[stage]: the factors of the micro-batches whose backward is split, in order: those of the stage's Ws."""
    late: list[list[float]] = [[] for _ in range(problem.num_stages)]
    backwards = [0] * problem.num_stages
    for row in rows:
        for letter in row:
            kind, s = divmod(letter, problem.num_stages)
            if kind in BACKWARD:
                if kind == INPUT:
                    late[s].append(problem.factors[backwards[s]])
                backwards[s] += 1
    return late
