"""Makes a schedule by rules: whenever a rank is free, the most urgent action that can run, or a short wait for one.

A `Policy` says what is urgent. An action's urgency is base[letter] + slope[letter] * micro_batch, the lowest first: a
target time, which can come from a rule (backward first, weight gradients in the bubbles) or from another schedule.
Two caps a stage bound what is in flight: forwards ahead of their backward, and weight gradients put off. With
`patience` a rank lets an action wait whose start would delay a more urgent one that is about to arrive.

Memory limits are kept without ever getting stuck, as a banker lends (Dijkstra 1965): a forward starts only if
afterwards the micro-batches in flight could still finish one by one, the oldest first.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from shardwise.schedule.problem import FORWARD, INPUT, WEIGHT, WHOLE, Problem, Rows

__all__ = ["Policy", "dispatch"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a rank prefers.

    base, slope: [letter], see above. ahead: [stage], forwards whose backward has not started, at most.
    put_off: [stage], weight gradients that wait, at most. whole: [stage], whether its backward stays in one.
    patience: the share of an action's seconds that a rank waits for a more urgent one rather than start it.
    """

    base: tuple[float, ...]
    slope: tuple[float, ...]
    ahead: tuple[int, ...]
    put_off: tuple[int, ...]
    whole: tuple[bool, ...]
    patience: float


def dispatch(problem: Problem, policy: Policy) -> Rows:
    """The rows that `policy` leads to; they keep the memory limits and are free of deadlock.

    A rank's limit must have room for one micro-batch on all its stages.
    """
    state = _State(problem, policy)
    events = [(0.0, r) for r in range(len(problem.ranks))]
    while events:
        now, rank = heapq.heappop(events)
        if now < state.free_at[rank]:
            continue
        letter, until = state.choose(rank, now)
        if letter >= 0:
            for event in state.start(rank, letter, now):
                heapq.heappush(events, event)
        elif until < math.inf:
            heapq.heappush(events, (until, rank))
    return state.rows


class _State:
    """What has been started so far, and when it ends."""

    def __init__(self, problem: Problem, policy: Policy) -> None:
        n = problem.num_stages
        self.problem, self.policy = problem, policy
        self.rows: Rows = [[] for _ in problem.ranks]
        self.free_at = [0.0] * len(problem.ranks)
        self.forwards: list[list[float]] = [[] for _ in range(n)]  # [stage][micro_batch]: end
        self.backwards: list[list[float]] = [[] for _ in range(n)]
        self.weights = [0] * n  # weight gradients done, a whole backward's among them
        self.kept = [max(a, w) for a, w in zip(problem.activation, problem.weight, strict=True)]  # [stage]
        self.held = [0.0] * len(problem.ranks)
        self.put_off = [0.0] * len(problem.ranks)  # the part of `held` that weight gradients would free
        self.back_letter = [(WHOLE if policy.whole[s] else INPUT) * n + s for s in range(n)]
        self.readers = _readers(problem)

    def choose(self, rank: int, now: float) -> tuple[int, float]:
        """The letter to start now, or -1 and when to look again."""
        policy, problem = self.policy, self.problem
        base, slope, n = policy.base, policy.slope, problem.num_stages
        best, best_urgency = -1, math.inf
        coming: list[tuple[float, float]] = []  # (when, urgency)
        for s in problem.ranks[rank]:
            forwards, backwards = self.forwards[s], self.backwards[s]
            m, done = len(backwards), self.weights[s]
            late = m - done > policy.put_off[s]
            if m < len(forwards) and not late:
                letter = self.back_letter[s]
                when, urgency = self._backward_ready(s, m), base[letter] + slope[letter] * m
                if when > now:
                    coming.append((when, urgency))
                elif urgency < best_urgency:
                    best, best_urgency = letter, urgency
            if done < m:
                letter = WEIGHT * n + s
                urgency = -math.inf if late else base[letter] + slope[letter] * done
                if urgency < best_urgency:
                    best, best_urgency = letter, urgency
            ahead = len(forwards)
            if ahead < problem.num_micro_batches and ahead - m < policy.ahead[s]:
                letter = FORWARD * n + s
                when, urgency = self._forward_ready(s, ahead), base[letter] + slope[letter] * ahead
                if when > now:
                    if when < math.inf:
                        coming.append((when, urgency))
                elif urgency < best_urgency and (not problem.limited or self._has_room(rank, s)):
                    best, best_urgency = letter, urgency
        if best < 0:
            return -1, min((when for when, _ in coming), default=math.inf)
        if policy.patience and coming:
            limit = now + policy.patience * problem.letter_seconds[best]
            sooner = min((when for when, urgency in coming if urgency < best_urgency), default=math.inf)
            if sooner < limit:
                return -1, sooner
        return best, now

    def start(self, rank: int, letter: int, now: float) -> list[tuple[float, int]]:
        """Notes that `letter` runs from now on; returns when which rank has a reason to look again."""
        problem = self.problem
        kind, s = divmod(letter, problem.num_stages)
        output = self.forwards[s] if kind == FORWARD else self.backwards[s]
        m = self.weights[s] if kind == WEIGHT else len(output)
        seconds = problem.letter_seconds[letter]
        factor = problem.factors[m] if problem.factors else 1.0
        end = now + seconds * factor
        self.rows[rank].append(letter)
        self.free_at[rank] = end
        self._keep(rank, kind, s)
        if kind == WEIGHT:
            self.weights[s] += 1
            return [(end, rank)]
        output.append(end)
        if kind == WHOLE:
            self.weights[s] += 1
        events = [(end, rank)]
        for reader, lag in self.readers[kind != FORWARD][s]:
            if self.free_at[reader] <= end + lag * factor:
                events.append((end + lag * factor, reader))
        return events

    def _keep(self, rank: int, kind: int, stage: int) -> None:
        kept, weight = self.kept[stage], self.problem.weight[stage]
        if kind == FORWARD:
            self.held[rank] += kept
        elif kind == INPUT:
            self.held[rank] += weight - kept
            self.put_off[rank] += weight
        elif kind == WEIGHT:
            self.held[rank] -= weight
            self.put_off[rank] -= weight
        else:
            self.held[rank] -= kept

    def _forward_ready(self, stage: int, m: int) -> float:
        when, factor = 0.0, self.problem.factors[m] if self.problem.factors else 1.0
        for t, lag in self.problem.forward_sources[stage]:
            ends = self.forwards[t]
            if m >= len(ends):
                return math.inf
            when = max(when, ends[m] + lag * factor)
        return when

    def _backward_ready(self, stage: int, m: int) -> float:
        when, factor = 0.0, self.problem.factors[m] if self.problem.factors else 1.0
        for t, lag in self.problem.backward_sources[stage]:
            ends = self.backwards[t]
            if m >= len(ends):
                return math.inf
            when = max(when, ends[m] + lag * factor)
        return when

    def _has_room(self, rank: int, stage: int) -> bool:
        """Whether the next forward of `stage` fits, and leaves enough for all in flight to finish in turn."""
        limit = self.problem.limits[rank] * (1 + 1e-12)
        if self.held[rank] + self.kept[stage] > limit:
            return False
        stages = self.problem.ranks[rank]
        if len(stages) == 1 or limit == math.inf:
            return True
        kept, whole = self.kept, sum(self.kept[s] for s in stages)
        free = limit - (self.held[rank] - self.put_off[rank] + kept[stage])
        done = {s: len(self.forwards[s]) + (s == stage) for s in stages}
        for m in range(min(len(self.backwards[s]) for s in stages), max(done.values())):
            if free >= whole:
                return True
            if sum(kept[s] for s in stages if done[s] <= m) > free:
                return False
            free += sum(kept[s] for s in stages if len(self.backwards[s]) <= m < done[s])
        return True


def _readers(problem: Problem) -> tuple[list[list[tuple[int, float]]], list[list[tuple[int, float]]]]:
    """[forward or backward][stage]: ranks that read what it makes, with the seconds until it is there."""
    forwards: list[list[tuple[int, float]]] = [[] for _ in range(problem.num_stages)]
    backwards: list[list[tuple[int, float]]] = [[] for _ in range(problem.num_stages)]
    for s in range(problem.num_stages):
        for t, lag in problem.forward_sources[s]:
            forwards[t].append((problem.owners[s], lag))
        for t, lag in problem.backward_sources[s]:
            backwards[t].append((problem.owners[s], lag))
    return forwards, backwards
