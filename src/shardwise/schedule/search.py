"""Searches a schedule for given costs, placement and memory limits: at least as good as every generator's.

It starts from every generator of this placement and from rules of a list scheduler, refines the rules, then the
rows themselves, and keeps what the simulator says is fastest. Every result is checked as the executor would run it,
transfers included. It knows neither modules nor how costs were found.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shardwise.errors import ScheduleError
from shardwise.schedule import GENERATORS, chunks_of, generate, placement
from shardwise.schedule.bounds import lower_bound
from shardwise.schedule.check import check
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges, checked
from shardwise.schedule.list_scheduler import Policy, dispatch
from shardwise.schedule.local_search import improve, merged
from shardwise.schedule.longest_path import times_of
from shardwise.schedule.memory import Memory, fits
from shardwise.schedule.policies import changed, first_policies
from shardwise.schedule.problem import Problem, Rows
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.simulate import seconds_of

__all__ = ["Searched", "search", "textbooks"]

NAME = "searched"
VISITS_PER_SECOND = 2_000_000  # actions that a slow core times in a second: makes a budget of seconds one of steps
VISITS_OF_DISPATCH = 15  # an action of the list scheduler costs as much as so many that are only timed
SECONDS_PER_ACTION, MOST_SECONDS = 40e-3, 10.0  # the budget where none is given
SHARE_OF_ROWS = 0.65  # of the budget goes to local search
ROUNDS = ((0, 0.3), (1, 0.1), (0, 0.0), (2, 0.3), (0, 0.1), (0, 0.0))  # of local search: (place of the start, heat)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search found. seconds: simulated, of one step.

    best_textbook: name and seconds of the fastest generator of this placement that fits the memory limits; None
    where there is none. lower_bound_s: no schedule of this placement is faster.
    """

    schedule: Schedule
    seconds: float
    best_textbook: tuple[str, float] | None
    lower_bound_s: float

    def __str__(self) -> str:
        text = f"{self.schedule}; {self.seconds:.6g} s, at best {self.lower_bound_s:.6g} s"
        if self.best_textbook is not None:
            name, seconds = self.best_textbook
            text += f", {name} {seconds:.6g} s"
        return text


def search(
    costs: Costs,
    *,
    num_micro_batches: int,
    ranks: Sequence[Sequence[int]],
    edges: Edges | None = None,
    memory: Memory | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> Searched:
    """The fastest schedule found for the stages `ranks[r]` of each rank, as `simulate` sees it.

    Never slower than any generator that has this placement and fits `memory`. `edges` is the chain if not given.
    `costs` price F, I, W and B of every stage; one that cannot be split has I as B and W as 0, and is kept whole.
    The budget `seconds` is turned into steps, so that a seed gives one result on every machine; where the clock says
    that it is used up nonetheless, the search ends with the best so far. It ends early at the lower bound.

    Raises ScheduleError if costs or memory do not fit the stages, or a limit has no room for one micro-batch.
    """
    num_stages = sum(map(len, ranks))
    edges = checked(edges, num_stages)
    problem = Problem.of(costs, edges, num_micro_batches=num_micro_batches, ranks=ranks, memory=memory)
    _check_room(problem)
    num_actions = 3 * num_stages * num_micro_batches
    budget = min(MOST_SECONDS, SECONDS_PER_ACTION * num_actions) if seconds is None else seconds
    found = _Search(problem=problem, costs=costs, memory=memory, budget=budget, chance=random.Random(seed))
    best_textbook = found.add_textbooks()
    found.try_policies()
    found.change_policies()
    found.change_rows()
    return found.result(best_textbook)


def textbooks(ranks: Sequence[Sequence[int]], num_micro_batches: int) -> Iterator[Schedule]:
    """The schedule of every generator that has this placement and ends a step before the next one begins."""
    placed = tuple(map(tuple, ranks))
    chunks = len(placed[0])
    for name, family in GENERATORS.items():
        fewest, most = family.chunks
        if chunks < fewest or (most is not None and chunks > most) or not family.flushes:
            continue
        if placement(name, num_ranks=len(placed), chunks=chunks_of(name, chunks)) == placed:
            with suppress(ScheduleError):  # one that is not made for so few micro-batches
                yield generate(name, num_ranks=len(placed), num_micro_batches=num_micro_batches, chunks=chunks)


@dataclass(kw_only=True)
class _Search:
    """What has been found so far, and what is left of the budget."""

    problem: Problem
    costs: Costs
    memory: Memory | None
    budget: float
    chance: random.Random
    schedule: Schedule | None = None
    seconds: float = float("inf")  # of `schedule`
    started_s: float = field(default_factory=time.monotonic)
    policies: list[tuple[float, int, Policy]] = field(default_factory=list)  # (seconds, number, policy)
    rows: list[tuple[float, Rows]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bound = lower_bound(self.problem)
        self.num_steps = int(
            self.budget * VISITS_PER_SECOND / (3 * self.problem.num_stages * self.problem.num_micro_batches)
        )

    def done(self, share: float = 1.0) -> bool:
        """Whether nothing can be gained, or the clock says that this share of the budget is used up."""
        return self.seconds <= self.bound * (1 + 1e-9) or time.monotonic() - self.started_s > share * self.budget

    def add_textbooks(self) -> tuple[str, float] | None:
        """Starts from the generators; the fastest that fits."""
        best: tuple[str, float] | None = None
        for schedule in textbooks(self.problem.ranks, self.problem.num_micro_batches):
            if not fits(schedule, self.memory):
                continue
            seconds = self._offer(schedule)
            self._keep(self.problem.rows(schedule))
            if best is None or seconds < best[1]:
                best = (schedule.name, seconds)
        return best

    def try_policies(self) -> None:
        """Lets the list scheduler follow each of the first rules, as many as the budget allows."""
        grid = list(first_policies(self.problem))
        first, rest = grid[:8], grid[8:]
        self.chance.shuffle(rest)
        for policy in (first + rest)[: max(8, self.num_steps // VISITS_OF_DISPATCH // 5)]:
            if self.policies and self.done(0.25):
                break
            self._try(policy)

    def change_policies(self) -> None:
        """Changes the best rules a little, again and again."""
        for _ in range(self.num_steps // VISITS_OF_DISPATCH // 5):
            if self.done(0.45):
                break
            self.policies.sort(key=lambda found: found[:2])
            del self.policies[8:]
            _, _, policy = self.policies[int(self.chance.random() ** 2 * len(self.policies))]
            self._try(changed(policy, self.problem, self.chance))

    def change_rows(self) -> None:
        """Refines the best rows again and again, hot and cold in turn."""
        for place, heat in ROUNDS:
            if self.done():
                break
            self._keep(
                improve(
                    self.problem,
                    self.rows[min(place, len(self.rows) - 1)][1],
                    chance=self.chance,
                    heat=heat,
                    num_steps=int(self.num_steps * SHARE_OF_ROWS / len(ROUNDS)),
                    target=self.bound * (1 + 1e-9),
                    stop=self.done,
                )
            )
        for place, (_, rows) in enumerate(self.rows):
            self._offer(self.problem.schedule(merged(self.problem, rows) if place == 0 else rows, NAME))

    def result(self, best_textbook: tuple[str, float] | None) -> Searched:
        assert self.schedule is not None
        check(self.schedule, self.problem.edges)
        return Searched(
            schedule=self.schedule, seconds=self.seconds, best_textbook=best_textbook, lower_bound_s=self.bound
        )

    def _try(self, policy: Policy) -> None:
        rows = dispatch(self.problem, policy)
        self.policies.append((self._keep(rows), len(self.policies), policy))

    def _keep(self, rows: Rows) -> float:
        """Notes rows that are among the best; their seconds."""
        times = times_of(self.problem, rows)
        if times is None:
            return float("inf")
        if len(self.rows) < 6 or times.seconds < self.rows[-1][0]:
            if all(times.seconds != seconds for seconds, _ in self.rows):
                self.rows.append((times.seconds, rows))
                self.rows.sort(key=lambda found: found[0])
                del self.rows[6:]
            if times.seconds < self.seconds:
                self._offer(self.problem.schedule(rows, NAME))
        return times.seconds

    def _offer(self, schedule: Schedule) -> float:
        """Keeps a schedule if the simulator finds it faster than the best so far; its seconds."""
        seconds = seconds_of(schedule, self.costs, self.problem.edges)
        shorter = self.schedule is None or seconds < self.seconds * (1 - 1e-12)
        if shorter or (seconds <= self.seconds and _length(schedule) < _length(self.schedule)):
            self.schedule, self.seconds = schedule, seconds
        return seconds


def _length(schedule: Schedule | None) -> int:
    return sum(map(len, schedule.actions)) if schedule is not None else 0


def _check_room(problem: Problem) -> None:
    """One micro-batch must fit, forward and backward, on all stages of each rank."""
    for r, stages in enumerate(problem.ranks):
        needed = sum(max(problem.activation[s], problem.weight[s]) for s in stages)
        if needed > problem.limits[r] * (1 + 1e-9):
            raise ScheduleError(
                f"a rank has room for one micro-batch on all its stages, but stages {list(stages)} of rank {r} keep "
                f"{needed:g} and its limit is {problem.limits[r]:g}; raise the limit, use smaller micro-batches, or "
                "recompute activations"
            )
