"""How fast no schedule can be: a lower bound for the seconds of a step, from what each rank has to do and when.

For every rank, its work is a problem of one machine: each action has a head (seconds before it can start, on the
longest path from the start), its seconds, and a tail (seconds that must follow it). Jackson's preemptive schedule
(Carlier 1982, "The one-machine sequencing problem", section 3) solves that exactly if actions may be interrupted,
which only makes it faster. The longest path of one micro-batch and the load of a rank are part of it.

Where all micro-batches are alike, heads and tails know more: a stage takes micro-batches one by one, and under a
memory limit that fits k micro-batches the forward of number n waits for the backward of number n - k.
"""

from __future__ import annotations

import heapq
import math

from shardwise.schedule.problem import FORWARD, INPUT, WEIGHT, WHOLE, Problem

__all__ = ["lower_bound"]

_Job = tuple[float, float, float]  # head, seconds, tail
_Grid = list[list[float]]  # [micro_batch][stage]


def lower_bound(problem: Problem) -> float:
    """Seconds that every schedule of `problem` takes at least."""
    heads = _heads(problem)
    tails = _tails(problem)
    return max(_jackson(_jobs(problem, r, heads, tails)) for r in range(len(problem.ranks)))


def _jobs(problem: Problem, rank: int, heads: tuple[_Grid, _Grid], tails: tuple[_Grid, _Grid]) -> list[_Job]:
    """What a rank runs: every forward, every part of a backward that others wait for, and the rest of it."""
    jobs: list[_Job] = []
    for s in problem.ranks[rank]:
        f = problem.seconds[FORWARD][s]
        passed, rest = _backward(problem, s)
        for m in range(problem.num_micro_batches):
            k = _factor(problem, m)
            jobs.append((heads[0][m][s], k * f, tails[0][m][s]))
            jobs.append((heads[1][m][s], k * passed, tails[1][m][s]))
            jobs.append((heads[1][m][s] + k * passed, k * rest, 0.0))
    return jobs


def _backward(problem: Problem, stage: int) -> tuple[float, float]:
    """Seconds until a backward can pass on its gradient, and seconds that are left then, at least."""
    i, w, b = (problem.seconds[kind][stage] for kind in (INPUT, WEIGHT, WHOLE))
    passed = min(i, b)
    return passed, min(i + w, b) - passed


def _factor(problem: Problem, micro_batch: int) -> float:
    return problem.factors[micro_batch] if problem.factors else 1.0


def _heads(problem: Problem) -> tuple[_Grid, _Grid]:
    """When each forward and each backward can start."""
    n, alike = problem.num_stages, not problem.factors
    room = [_room(problem, s) for s in range(n)]
    forwards: _Grid = []
    backwards: _Grid = []
    for m in range(problem.num_micro_batches):
        k = _factor(problem, m)
        f = [k * x for x in problem.seconds[FORWARD]]
        b = [k * _backward(problem, s)[0] for s in range(n)]
        starts = [0.0] * n
        for s in range(n):
            starts[s] = max((starts[t] + f[t] + k * lag for t, lag in problem.forward_sources[s]), default=0.0)
            if alike and m:
                starts[s] = max(starts[s], forwards[m - 1][s] + f[s])
            if alike and m >= room[s]:
                starts[s] = max(starts[s], backwards[m - room[s]][s] + b[s])
        forwards.append(starts)
        backs = [starts[s] + f[s] for s in range(n)]
        for s in reversed(range(n)):
            backs[s] = max((backs[t] + b[t] + k * lag for t, lag in problem.backward_sources[s]), default=backs[s])
            backs[s] = max(backs[s], starts[s] + f[s])
            if alike and m:
                backs[s] = max(backs[s], backwards[m - 1][s] + b[s])
        backwards.append(backs)
    return forwards, backwards


def _room(problem: Problem, stage: int) -> int:
    """Micro-batches whose activations of this stage the rank can keep at once."""
    activation, limit = problem.activation[stage], problem.limits[problem.owners[stage]]
    if not (activation > 0 and math.isfinite(limit)):
        return problem.num_micro_batches
    return max(1, math.floor(limit / activation * (1 + 1e-9)))


def _tails(problem: Problem) -> tuple[_Grid, _Grid]:
    """What must follow each forward and each backward's passing on of its gradient."""
    n, alike, last = problem.num_stages, not problem.factors, problem.num_micro_batches - 1
    forwards: _Grid = [[] for _ in range(last + 1)]
    backwards: _Grid = [[] for _ in range(last + 1)]
    for m in reversed(range(last + 1)):
        k = _factor(problem, m)
        f = [k * x for x in problem.seconds[FORWARD]]
        b, rest = zip(*((k * x, k * y) for x, y in (_backward(problem, s) for s in range(n))), strict=True)
        after = list(rest)
        for s in range(n):  # ascending: a gradient runs down, so a stage's tail is made of those below
            if alike and m < last:
                after[s] = max(after[s], b[s] + backwards[m + 1][s])
            for t, lag in problem.forward_sources[s]:
                after[s] = max(after[s], k * _back_lag(problem, t, s, lag) + b[t] + after[t])
        backwards[m] = after
        following = [b[s] + after[s] for s in range(n)]
        for s in reversed(range(n)):
            if alike and m < last:
                following[s] = max(following[s], f[s] + forwards[m + 1][s])
            for t, _ in problem.backward_sources[s]:
                lag = next(lag for source, lag in problem.forward_sources[t] if source == s)
                following[s] = max(following[s], k * lag + f[t] + following[t])
        forwards[m] = following
    return forwards, backwards


def _back_lag(problem: Problem, below: int, stage: int, default: float) -> float:
    """Seconds of a gradient from `stage` to `below`."""
    return next((lag for t, lag in problem.backward_sources[below] if t == stage), default)


def _jackson(jobs: list[_Job]) -> float:
    """The end of Jackson's preemptive schedule: always the job of the longest tail, interrupted by longer ones."""
    waiting = sorted(jobs)
    ready: list[tuple[float, float]] = []  # (-tail, seconds left)
    now = end = 0.0
    index = 0
    while index < len(waiting) or ready:
        if not ready:
            now = max(now, waiting[index][0])
        while index < len(waiting) and waiting[index][0] <= now:
            heapq.heappush(ready, (-waiting[index][2], waiting[index][1]))
            index += 1
        tail, left = heapq.heappop(ready)
        until = waiting[index][0] if index < len(waiting) else math.inf
        if now + left <= until:
            now += left
            end = max(end, now - tail)
        else:
            heapq.heappush(ready, (tail, left - (until - now)))
            now = until
    return end
