"""The fastest schedule there is, proven by a constraint solver; for small cases, to know how good a search is.

Needs the extra `solver` (OR-tools' CP-SAT). One interval an action; the actions of a rank do not overlap; a value is
there its transfer's seconds after it is made (links are never crowded and receives always posted in time, which makes
no schedule slower, so the bound holds); what a rank keeps is a cumulative resource. Seconds become whole ticks, rounded
down, so that the bound also holds for the numbers given.

It refuses to run in a process that has loaded HiGHS: the solver carries another build of it, and the two do not mix.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwise.errors import ConfigError
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges, checked
from shardwise.schedule.longest_path import times_of
from shardwise.schedule.memory import Memory
from shardwise.schedule.problem import FORWARD, INPUT, WEIGHT, WHOLE, Problem
from shardwise.schedule.schedule import Schedule

__all__ = ["Proof", "prove"]

TICKS = 2_000_000  # of the fastest known schedule
_Key = tuple[int, int, int]  # (kind, stage, micro-batch)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """bound_s: no schedule is faster. optimal: the solver closed, so that one of `seconds` (rounded down) exists."""

    bound_s: float
    seconds: float | None
    optimal: bool


def prove(
    costs: Costs,
    *,
    num_micro_batches: int,
    ranks: Sequence[Sequence[int]],
    known: Schedule,
    edges: Edges | None = None,
    memory: Memory | None = None,
    seconds: float = 30.0,
    num_threads: int = 1,
) -> Proof:
    """A proven lower bound for every schedule of this placement; `known` is one of them, to start from.

    Raises ConfigError without the extra `solver`, or where HiGHS is loaded in this process.
    """
    cp_model = _solver()
    edges = checked(edges, sum(map(len, ranks)))
    problem = Problem.of(costs, edges, num_micro_batches=num_micro_batches, ranks=ranks, memory=memory)
    times = times_of(problem, problem.rows(known))
    assert times is not None
    tick = times.seconds / TICKS
    built = _Built(cp_model, problem, tick, horizon=math.ceil(times.seconds / tick) + 1)
    built.hint(known, times.starts)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = num_threads
    status = solver.solve(built.model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return Proof(
        bound_s=solver.best_objective_bound * tick,
        seconds=solver.objective_value * tick if found else None,
        optimal=status == cp_model.OPTIMAL,
    )


def _solver() -> Any:
    if loaded := [name for name in ("highspy", "scipy.optimize._highspy._core") if name in sys.modules]:
        raise ConfigError(
            f"the solver must not share a process with HiGHS, but {loaded[0]} is loaded; prove in a process of its own"
        )
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ConfigError(
            'an exact schedule needs the solver, which is not installed; run: pip install "shardwise[solver]"'
        ) from error
    return cp_model


class _Built:
    """The model: variables by (kind, stage, micro-batch)."""

    def __init__(self, cp_model: Any, problem: Problem, tick: float, horizon: int) -> None:
        self.model = cp_model.CpModel()
        self.problem, self.tick, self.horizon = problem, tick, horizon
        self.start: dict[_Key, Any] = {}
        self.end: dict[_Key, Any] = {}
        self.split: dict[tuple[int, int], Any] = {}  # (stage, micro-batch): whether the backward is I and W
        self.busy: list[list[Any]] = [[] for _ in problem.ranks]
        self.kept: list[list[tuple[Any, float]]] = [[] for _ in problem.ranks]
        self.makespan = self.model.new_int_var(0, horizon, "step")
        for m in range(problem.num_micro_batches):
            for s in range(problem.num_stages):
                self._add_actions(s, m)
        for m in range(problem.num_micro_batches):
            for s in range(problem.num_stages):
                self._add_order(s, m)
        for r in range(len(problem.ranks)):
            self.model.add_no_overlap(self.busy[r])
            self._add_limit(r)
        self.model.minimize(self.makespan)

    def ticks(self, seconds: float, m: int) -> int:
        factor = self.problem.factors[m] if self.problem.factors else 1.0
        return math.floor(seconds * factor / self.tick * (1 + 1e-12))

    def _variable(self, key: _Key) -> Any:
        self.start[key] = self.model.new_int_var(0, self.horizon, f"start{key}")
        return self.start[key]

    def _add_actions(self, s: int, m: int) -> None:
        model, seconds = self.model, self.problem.seconds
        f, i, w, b = (self.ticks(seconds[kind][s], m) for kind in (FORWARD, INPUT, WEIGHT, WHOLE))
        rank = self.busy[self.problem.owners[s]]
        forward = self._variable((FORWARD, s, m))
        self.end[FORWARD, s, m] = forward + f
        rank.append(model.new_fixed_size_interval_var(forward, f, f"F{s},{m}"))
        back, back_end = self._variable((INPUT, s, m)), model.new_int_var(0, self.horizon, "")
        late, late_end = self._variable((WEIGHT, s, m)), model.new_int_var(0, self.horizon, "")
        self.end[INPUT, s, m], self.end[WEIGHT, s, m] = back_end, late_end
        if self.problem.splits[s] and b < i + w:
            split = model.new_bool_var(f"split{s},{m}")
            size_i = i * split + b * (1 - split)
            size_w = w * split
        else:  # nothing is gained by a whole backward
            split = 1 if self.problem.splits[s] else 0
            size_i, size_w = (i, w) if split else (b, 0)
        self.split[s, m] = split
        rank.append(model.new_interval_var(back, size_i, back_end, f"I{s},{m}"))
        rank.append(model.new_interval_var(late, size_w, late_end, f"W{s},{m}"))
        model.add(late_end <= self.makespan)
        model.add(late >= back_end)
        model.add(back >= self.end[FORWARD, s, m])

    def _add_order(self, s: int, m: int) -> None:
        model, problem = self.model, self.problem
        for t, lag in problem.forward_sources[s]:
            model.add(self.start[FORWARD, s, m] >= self.end[FORWARD, t, m] + self.ticks(lag, m))
        for t, lag in problem.backward_sources[s]:
            model.add(self.start[INPUT, s, m] >= self.end[INPUT, t, m] + self.ticks(lag, m))
        if m and not problem.factors:  # all are alike, so they may as well go in order
            for kind in (FORWARD, INPUT, WEIGHT):
                model.add(self.start[kind, s, m] >= self.end[kind, s, m - 1])

    def _add_limit(self, r: int) -> None:
        """Cumulative: the larger part from F to the end of the backward, what W needs to the end of W."""
        problem, model, limit = self.problem, self.model, self.problem.limits[r]
        if not math.isfinite(limit):
            return
        scale = 1e6 / max(limit, 1e-300)
        intervals, demands = [], []
        for s in problem.ranks[r]:
            activation, weight = problem.activation[s], problem.weight[s]
            early = math.floor(max(0.0, activation - weight) * scale)
            late = math.floor(min(activation, weight) * scale)
            for m in range(problem.num_micro_batches):
                start = self.start[FORWARD, s, m]
                for last, demand in ((self.end[INPUT, s, m], early), (self.end[WEIGHT, s, m], late)):
                    if demand:
                        size = model.new_int_var(0, self.horizon, "")
                        intervals.append(model.new_interval_var(start, size, last, ""))
                        demands.append(demand)
        if intervals:
            model.add_cumulative(intervals, demands, math.ceil(limit * scale))

    def hint(self, known: Schedule, starts: Sequence[Sequence[float]]) -> None:
        """Starts the solver from `known`, whose actions start then."""
        names: Mapping[str, int] = {"F": FORWARD, "I": INPUT, "W": WEIGHT, "B": INPUT}
        seen: dict[tuple[int, int], int] = {}
        for row, begun in zip(known.actions, starts, strict=True):
            for action, start in zip(row, begun, strict=True):
                kind = names[action.kind]
                m = seen.get((kind, action.stage), 0)
                seen[kind, action.stage] = m + 1
                self.model.add_hint(self.start[kind, action.stage, m], math.floor(start / self.tick))
