"""The front of two objectives: what no other is better than in both. Knows numbers alone.

bytes                        the staircase from below: sorted by time, each one that needs less than all before
  x
    x   .
       x    .
           x      seconds
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shardwise.plan.ranked import Ranked

__all__ = ["front_of"]


def front_of(found: Iterable[Ranked], second: Callable[[Ranked], float]) -> list[Ranked]:
    """Those of `found` that none beats in both seconds and `second`, the fastest first."""
    front: list[Ranked] = []
    for ranked in sorted(found, key=lambda each: (each.price.step_s, second(each))):
        if not front or second(ranked) < second(front[-1]):
            front.append(ranked)
    return front
