"""Cut a row of weights into consecutive parts: the heaviest as light as can be. Exact; knows no model.

Of all cuts with the lightest heaviest part the one of least traffic is taken, and of those the most even one.
Dynamic programming over the cut points, as for the linear partition problem (Skiena, The Algorithm Design
Manual, section 10.7).

    weights  1 3 3 3 2      2 parts   1 3 3 | 3 2      heaviest 7

Where parts are owned by fewer ranks, several each, a heavy part is then moved away from a rank that has another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

__all__ = ["balanced_ends", "evened_ends"]

_SLACK = 1 + 1e-9  # sums of floating-point numbers in another order


def balanced_ends(
    weights: Sequence[float], traffic: Sequence[float], counts: Sequence[bool], num_parts: int
) -> list[int]:
    """For every part the index after its last element; the last end is `len(weights)`.

    traffic[i] is what a cut in front of element i costs; every part holds at least one element that `counts`.
    The caller sees to it that there are at least `num_parts` of these.
    """
    sums = np.array([0.0, *accumulate(weights)])
    counted = np.array([0, *accumulate(map(int, counts))])
    limit = _lightest(sums, counted, num_parts) * _SLACK
    return _cheapest(sums.tolist(), counted.tolist(), traffic, num_parts, limit)


def evened_ends(
    ends: Sequence[int],
    weights: Sequence[float],
    traffic: Sequence[float],
    counts: Sequence[bool],
    owner_of: Sequence[int],
) -> list[int]:
    """`ends` as `balanced_ends` gives them, with cuts moved by an element at a time as long as that makes the heaviest
    rank lighter, or leaves it and makes ranks more even; `owner_of[part]` is its rank. Never to where traffic is more.

        parts 3 2 2 2.5 owned as a V, 0 1 1 0, of elements of 1: 2 3 2 2.5, so that no rank has 5.5
    """
    sums = [0.0, *accumulate(weights)]
    counted = [0, *accumulate(map(int, counts))]

    def load(ends: Sequence[int]) -> tuple[float, float]:
        of_ranks = [0.0] * (max(owner_of) + 1)
        for part, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            of_ranks[owner_of[part]] += sums[end] - sums[start]
        return max(of_ranks), sum(each * each for each in of_ranks)

    best, current = load(ends), list(ends)
    moving = True
    while moving:
        moving = False
        for place, step in itertools.product(range(len(current) - 1), (-1, 1)):
            moved = [*current[:place], current[place] + step, *current[place + 1 :]]
            bounds = [0, *moved]
            if any(counted[a] >= counted[b] for a, b in itertools.pairwise(bounds)):
                continue
            if traffic[moved[place]] > traffic[current[place]]:
                continue
            found = load(moved)
            if found[0] < best[0] / _SLACK or (found[0] <= best[0] * _SLACK and found[1] < best[1] / _SLACK):
                best, current, moving = found, moved, True
    return current


def _lightest(sums: np.ndarray, counted: np.ndarray, num_parts: int) -> float:
    """The weight of the heaviest part, minimised."""
    n = len(sums) - 1
    best = np.where(counted > 0, sums, np.inf)  # best[j]: the first j elements in the parts so far
    for _ in range(1, num_parts):
        following = np.full(n + 1, np.inf)
        for j in range(1, n + 1):
            heaviest = np.maximum(best[:j], sums[j] - sums[:j])
            heaviest[counted[:j] == counted[j]] = np.inf
            following[j] = heaviest.min()
        best = following
    return float(best[n])


def _cheapest(
    sums: Sequence[float], counted: Sequence[int], traffic: Sequence[float], num_parts: int, limit: float
) -> list[int]:
    """Ends of the parts, none heavier than `limit`, with the least (traffic, sum of squared weights)."""
    n = len(sums) - 1
    Cost = tuple[float, float]
    best: list[dict[int, tuple[Cost, int]]] = [{0: ((0.0, 0.0), 0)}]  # part -> end -> (cost, start)
    for _ in range(num_parts):
        before, here = best[-1], {}
        for end in range(1, n + 1):
            options: list[tuple[Cost, int]] = []
            for start in range(end - 1, -1, -1):
                weight = sums[end] - sums[start]
                if weight > limit:
                    break
                if start in before and counted[end] > counted[start]:
                    crossing, squares = before[start][0]
                    toll = traffic[start] if start else 0.0
                    options.append(((crossing + toll, squares + weight * weight), start))
            if options:
                here[end] = min(options)
        best.append(here)
    ends = [n]
    for part in range(num_parts, 1, -1):
        ends.append(best[part][ends[-1]][1])
    return ends[::-1]
