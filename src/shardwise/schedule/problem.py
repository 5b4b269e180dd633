"""What the search for a schedule computes with: plain numbers and lists in place of actions, costs and graphs.

A rank's row is a list of letters; a letter is a kind of action on a stage, and its n-th occurrence works on
micro-batch n: on each stage micro-batches go in ascending order. Where all micro-batches are alike this loses
nothing, since the n-th action of its kind on a stage can always be given the n-th micro-batch.

    letter = kind * num_stages + stage        kinds F = 0, I = 1, W = 2, B = 3

This file knows what depends on what and what it costs; it decides nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edge, Edges, predecessors, successors
from shardwise.schedule.memory import Memory, check_memory
from shardwise.schedule.schedule import Schedule

__all__ = ["BACKWARD", "FORWARD", "INPUT", "WEIGHT", "WHOLE", "Problem", "Rows"]

FORWARD, INPUT, WEIGHT, WHOLE = range(4)
KINDS = (Kind.F, Kind.I, Kind.W, Kind.B)
BACKWARD = (INPUT, WHOLE)
_NUMBER_OF = {kind: number for number, kind in enumerate(KINDS)}

Rows = list[list[int]]  # [rank]: letters in the order in which they run
Source = tuple[int, float]  # (stage that makes the value, seconds until it is there)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Stages on ranks, what each letter costs and needs, and what a rank may keep."""

    num_stages: int
    num_micro_batches: int
    ranks: tuple[tuple[int, ...], ...]
    edges: Edges
    seconds: tuple[tuple[float, ...], ...]  # [kind][stage]
    forward_sources: tuple[tuple[Source, ...], ...]  # [stage]
    backward_sources: tuple[tuple[Source, ...], ...]  # [stage]
    factors: tuple[float, ...]  # [micro_batch]; empty if all are alike
    activation: tuple[float, ...]  # [stage], all 0 where no memory is given
    weight: tuple[float, ...]  # [stage]
    limits: tuple[float, ...]  # [rank]

    @classmethod
    def of(
        cls,
        costs: Costs,
        edges: Edges,
        *,
        num_micro_batches: int,
        ranks: Sequence[Sequence[int]],
        memory: Memory | None,
    ) -> Problem:
        """Raises ScheduleError if costs or memory are for other stages or ranks."""
        num_stages = sum(map(len, ranks))
        if memory is None:
            memory = Memory(activation_bytes=(0.0,) * num_stages, weight_bytes=(0.0,) * num_stages)
        check_memory(memory, num_stages=num_stages, num_ranks=len(ranks))
        owner = {s: r for r, stages in enumerate(ranks) for s in stages}

        def seconds_along(edge: Edge, *, back: bool) -> float:
            priced = costs.gradient_seconds if back else costs.activation_seconds
            return 0.0 if owner[edge[0]] == owner[edge[1]] else priced.get(edge, 0.0)

        below, above = predecessors(edges, num_stages), successors(edges, num_stages)
        alike = len(set(costs.micro_batch_factors)) <= 1
        scale = costs.micro_batch_factors[0] if alike and costs.micro_batch_factors else 1.0
        return cls(
            num_stages=num_stages,
            num_micro_batches=num_micro_batches,
            ranks=tuple(map(tuple, ranks)),
            edges=edges,
            seconds=tuple(tuple(scale * x for x in _row(costs, kind, num_stages)) for kind in KINDS),
            forward_sources=tuple(
                tuple((t, scale * seconds_along((t, s), back=False)) for t in below[s]) for s in range(num_stages)
            ),
            backward_sources=tuple(
                tuple((t, scale * seconds_along((s, t), back=True)) for t in above[s]) for s in range(num_stages)
            ),
            factors=() if alike else costs.micro_batch_factors,
            activation=memory.activation_bytes,
            weight=memory.weight_bytes,
            limits=tuple(memory.limit_of(r) for r in range(len(ranks))),
        )

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The rank of each stage."""
        owner = {s: r for r, stages in enumerate(self.ranks) for s in stages}
        return tuple(owner[s] for s in range(self.num_stages))

    @cached_property
    def letter_seconds(self) -> tuple[float, ...]:
        """[letter]: seconds of one micro-batch whose factor is 1."""
        return tuple(x for row in self.seconds for x in row)

    @cached_property
    def letter_memory(self) -> tuple[float, ...]:
        """[letter]: what it adds to what its rank keeps."""
        kept = list(zip(self.activation, self.weight, strict=True))
        return (
            *(a for a, _ in kept),
            *(w - a for a, w in kept),
            *(-w for _, w in kept),
            *(-a for a, _ in kept),
        )

    @cached_property
    def splits(self) -> tuple[bool, ...]:
        """[stage]: whether its backward can be split to any use: W costs something."""
        return tuple(x > 0 for x in self.seconds[WEIGHT])

    @cached_property
    def limited(self) -> bool:
        return any(math.isfinite(limit) for limit in self.limits)

    def fits(self, rank: int, row: Sequence[int]) -> bool:
        """Whether that rank stays within its limit with this row."""
        limit = self.limits[rank] * (1 + 1e-9)
        return max(accumulate(map(self.letter_memory.__getitem__, row)), default=0.0) <= limit

    def load(self, rank: int) -> float:
        """Seconds that the rank computes at least: the backward whole or split, whichever is cheaper."""
        total = sum(self.factors) if self.factors else self.num_micro_batches
        f, i, w, b = self.seconds
        return total * sum(f[s] + min(i[s] + w[s], b[s]) for s in self.ranks[rank])

    def schedule(self, rows: Rows, name: str) -> Schedule:
        """The rows as a value that others read."""
        return Schedule(
            name=name,
            num_stages=self.num_stages,
            num_micro_batches=self.num_micro_batches,
            ranks=self.ranks,
            actions=tuple(_actions(row, self.num_stages) for row in rows),
        )

    def rows(self, schedule: Schedule) -> Rows:
        """The letters of a schedule: its micro-batches renumbered to ascend on each stage."""
        return [
            [
                _NUMBER_OF[action.kind] * self.num_stages + action.stage
                for action in row
                if isinstance(action, Action) and action.kind in _NUMBER_OF
            ]
            for row in schedule.actions
        ]


def _row(costs: Costs, kind: Kind, num_stages: int) -> tuple[float, ...]:
    seconds = costs.compute_seconds.get(kind, ())
    if len(seconds) != num_stages:
        raise ScheduleError(
            f"a search needs what F, I, W and B cost on each of {num_stages} stages, but {kind} has {len(seconds)} "
            f"numbers; give compute_seconds[Kind.{kind}], for a stage that cannot split I as B and W as 0"
        )
    return seconds


def _actions(row: Sequence[int], num_stages: int) -> tuple[Action, ...]:
    forwards, backwards = [0] * num_stages, [0] * num_stages
    split: list[deque[int]] = [deque() for _ in range(num_stages)]
    actions = []
    for letter in row:
        kind, s = divmod(letter, num_stages)
        if kind == FORWARD:
            m, forwards[s] = forwards[s], forwards[s] + 1
        elif kind == WEIGHT:
            m = split[s].popleft()
        else:
            m, backwards[s] = backwards[s], backwards[s] + 1
            if kind == INPUT:
                split[s].append(m)
        actions.append(Action(kind=KINDS[kind], stage=s, micro_batch=m))
    return tuple(actions)
