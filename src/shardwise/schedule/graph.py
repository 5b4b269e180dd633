"""The graph of stages: edges (s, t) with s < t, along which an activation runs forward and a gradient back.

Stages are numbered topologically, so any such set of edges is free of cycles. A chain, long skips, an encoder
read by every decoder stage and two towers joined in one head are all graphs of this kind:

    0 → 1 → 2       0 ─┬→ 2 → 3
                    1 ─┘
"""

from __future__ import annotations

from shardwise.errors import ScheduleError

__all__ = ["Edge", "Edges", "chain", "checked", "predecessors", "successors"]

Edge = tuple[int, int]
Edges = frozenset[Edge]


def chain(num_stages: int) -> Edges:
    """Every stage feeds the next one, and only that one."""
    return frozenset((s, s + 1) for s in range(num_stages - 1))


def checked(edges: Edges | None, num_stages: int) -> Edges:
    """`edges`, or the chain if None. Raises ScheduleError unless 0 <= s < t < num_stages for each (s, t)."""
    if edges is None:
        return chain(num_stages)
    for s, t in sorted(edges):
        if not 0 <= s < t < num_stages:
            raise ScheduleError(
                f"an edge runs from a stage to one of a higher number below {num_stages}, but found ({s}, "
                f"{t}); number the stages in an order in which each one comes after all it reads"
            )
    return edges


def predecessors(edges: Edges, num_stages: int) -> tuple[tuple[int, ...], ...]:
    """The stages that each stage reads, ascending."""
    return successors(frozenset((t, s) for s, t in edges), num_stages)


def successors(edges: Edges, num_stages: int) -> tuple[tuple[int, ...], ...]:
    """The stages that read each stage, ascending."""
    found: list[list[int]] = [[] for _ in range(num_stages)]
    for s, t in sorted(edges):
        found[s].append(t)
    return tuple(map(tuple, found))
