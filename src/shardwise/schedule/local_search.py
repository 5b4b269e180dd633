"""Makes rows faster by small moves: one action to another place of its rank's row, a backward split or merged.

A step moves something on the longest path through the rows: a run of actions without a gap, begun by a value that
arrived late and ended by one that another rank waits for, or the end. Three things shorten it: its last action goes
ahead of others, one of the others goes behind it, or one goes into the gap ahead of its first. A move that makes the
step no longer is kept, and a slightly longer one with a probability that falls to nothing (simulated annealing,
Kirkpatrick 1983); moves that break an order or a memory limit are not tried.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from shardwise.schedule.longest_path import Times, times_of
from shardwise.schedule.problem import FORWARD, INPUT, WEIGHT, WHOLE, Problem, Rows

__all__ = ["improve", "merged"]

Run = tuple[int, int, int]  # (rank, first place, last place)


def improve(
    problem: Problem,
    rows: Rows,
    *,
    chance: random.Random,
    heat: float,
    num_steps: int,
    target: float,
    stop: Callable[[], bool],
) -> Rows:
    """Rows that are no slower; ends after `num_steps`, at `target` seconds or when `stop` says so.

    heat: how much longer a move may make the step at first, roughly, in mean seconds of an action.
    """
    times = times_of(problem, rows)
    assert times is not None
    best, best_seconds = [list(row) for row in rows], times.seconds
    rows, now = [list(row) for row in rows], times
    path = _path(problem, rows, now)
    action_s = sum(map(problem.load, range(len(rows)))) / sum(map(len, rows))
    for step in range(num_steps):
        if best_seconds <= target or stop():
            break
        move = _Move.drawn(problem, rows, path, chance)
        if move is None:
            continue
        kept, rows[move.rank] = rows[move.rank], move.row
        cooled = heat * action_s * (1 - step / num_steps) ** 2
        limit = now.seconds - cooled * math.log(1 - chance.random())
        moved = times_of(problem, rows, limit=limit)
        if moved is None or moved.seconds > limit:
            rows[move.rank] = kept
            continue
        now = moved
        path = _path(problem, rows, now)
        if now.seconds < best_seconds * (1 - 1e-12):
            best, best_seconds = [list(row) for row in rows], now.seconds
    return best


def merged(problem: Problem, rows: Rows) -> Rows:
    """The rows with I and W right behind each other made one B where that costs no time: all of a rank, or parts."""
    times = times_of(problem, rows)
    assert times is not None
    for r in range(len(rows)):
        parts = [(0, len(rows[r]))]
        while parts:
            first, last = parts.pop()
            row = _merge_all(problem, rows[r], first, last)
            if len(row) == len(rows[r]):
                continue
            tried = [*rows[:r], row, *rows[r + 1 :]]
            now = times_of(problem, tried, limit=times.seconds)
            if now is not None and now.seconds <= times.seconds and problem.fits(r, row):
                rows = tried  # parts that are left stand ahead of this one, so their places stay
            elif last - first > max(2, len(rows[r]) // 3):
                middle = (first + last) // 2
                parts.extend([(first, middle), (middle, last)])
    return rows


def _merge_all(problem: Problem, row: list[int], first: int, last: int) -> list[int]:
    """The row with every W from `first` to `last` that follows an I of its stage made one with it."""
    n = problem.num_stages
    made = row[:first]
    for letter in row[first:last]:
        kind, s = divmod(letter, n)
        if kind == WEIGHT and made and made[-1] == INPUT * n + s:
            made[-1] = WHOLE * n + s
        else:
            made.append(letter)
    return made + row[last:]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Move:
    """A rank's row as it would be."""

    rank: int
    row: list[int]

    @classmethod
    def drawn(cls, problem: Problem, rows: Rows, path: list[Run], chance: random.Random) -> _Move | None:
        """A random move on the path that keeps orders and limits; None if the draw was none."""
        rank, first, last = path[chance.randrange(len(path))]
        row = rows[rank]
        kind = chance.random()
        if kind < 0.1:
            made = _resplit(problem, row, chance.randint(first, last))
        else:
            if first == last and kind < 0.7:
                source, target = last, max(0, last - 1 - int(chance.expovariate(0.3)))
            elif kind < 0.4:  # the last action ahead of others
                source, target = last, chance.randint(first, last)
            elif kind < 0.7:  # one of the others behind it
                source = chance.randint(first, last)
                target = min(len(row) - 1, last + int(chance.expovariate(0.2)))
            elif kind < 0.9:  # one into a gap ahead
                source = chance.randint(first, last)
                target = max(0, first - int(chance.expovariate(0.5)))
            else:
                source = chance.randint(first, last)
                target = min(len(row) - 1, max(0, source + chance.choice((-2, -1, 1, 2))))
            made = _shifted(problem, row, source, target) if source != target else None
        if made is None or (problem.limited and not problem.fits(rank, made)):
            return None
        return cls(rank=rank, row=made)


def _shifted(problem: Problem, row: list[int], source: int, target: int) -> list[int] | None:
    """The row with one letter moved to `target`; None where an F, its backward and its W would change order."""
    letter = row[source]
    n = problem.num_stages
    s = letter % n
    if target > source:
        passed, before = row[source + 1 : target + 1], row[:source]
    else:
        passed, before = row[target:source], row[:target]
    if all(other == letter for other in passed):
        return None
    counts = [before.count(k * n + s) for k in range(4)]
    shifted = [*passed, letter] if target > source else [letter, *passed]
    for other in shifted:
        k, t = divmod(other, n)
        if t == s:
            counts[k] += 1
            if counts[INPUT] + counts[WHOLE] > counts[FORWARD] or counts[WEIGHT] > counts[INPUT]:
                return None
    return [*before, *shifted, *row[max(source, target) + 1 :]]


def _resplit(problem: Problem, row: list[int], place: int) -> list[int] | None:
    """The row with the backward there split in two, or merged with the next W of its stage."""
    n = problem.num_stages
    kind, s = divmod(row[place], n)
    if kind == WHOLE and problem.splits[s]:
        return [*row[:place], INPUT * n + s, WEIGHT * n + s, *row[place + 1 :]]
    if kind == INPUT:
        try:
            behind = row.index(WEIGHT * n + s, place + 1)
        except ValueError:
            return None
        made = [*row[:place], WHOLE * n + s, *row[place + 1 : behind], *row[behind + 1 :]]
        counts = 0
        for letter in made:  # the Ws that are left must still stand behind their I
            counts += (letter == INPUT * n + s) - (letter == WEIGHT * n + s)
            if counts < 0:
                return None
        return made
    return None


def _path(problem: Problem, rows: Rows, times: Times) -> list[Run]:
    """The longest path, from its end: the runs of actions that it goes through."""
    n = problem.num_stages
    starts, ends = times.starts, times.ends
    rank = max(range(len(rows)), key=lambda r: ends[r][-1])
    place = len(rows[rank]) - 1
    runs: list[Run] = []
    while True:
        last = place
        while place and starts[rank][place] <= ends[rank][place - 1]:
            place -= 1
        runs.append((rank, place, last))
        if starts[rank][place] <= 0:
            return runs
        kind, s = divmod(rows[rank][place], n)
        forward = kind == FORWARD
        alike = (FORWARD * n + s,) if forward else (INPUT * n + s, WHOLE * n + s)
        m = sum(map(rows[rank][:place].count, alike))
        sources = problem.forward_sources[s] if forward else problem.backward_sources[s]
        _, rank, place = max(
            (ends[r][i] + lag, r, i)
            for (r, i), lag in ((_where(problem, rows, t, m, forward=forward), lag) for t, lag in sources)
        )


def _where(problem: Problem, rows: Rows, stage: int, m: int, *, forward: bool) -> tuple[int, int]:
    """Rank and place of the m-th forward, or backward, of a stage."""
    rank, n = problem.owners[stage], problem.num_stages
    wanted = (FORWARD * n + stage,) if forward else (INPUT * n + stage, WHOLE * n + stage)
    left = m
    for place, letter in enumerate(rows[rank]):
        if letter in wanted:
            if not left:
                return rank, place
            left -= 1
    raise AssertionError("every value is made by its stage")
