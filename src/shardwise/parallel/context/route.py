"""Which way the keys of every rank take around a ring. Arithmetic on placements; no tensors, no transport.

contiguous, causal, 4 ranks     keys of 0 → 1 → 2 → 3      of 1 → 2 → 3      of 2 → 3      of 3: nobody else's
zigzag, causal, 4 ranks         keys of 0 → 1 → 2 → 3      of 1 → 2 → 3 → 0  ...
"""

from __future__ import annotations

import dataclasses
import functools

from shardwise.parallel.context.masks import Block, visible_blocks
from shardwise.parallel.context.placement import Placement

__all__ = ["Route"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """Who needs whose keys, seen from one rank. Keys that are on one context are whole on every rank."""

    rank: int
    queries: Placement
    keys: Placement
    is_causal: bool

    @property
    def own(self) -> int:
        """The context whose keys are here from the start."""
        return self.rank if self.keys.contexts > 1 else 0

    @property
    def sources(self) -> tuple[int, ...]:
        """Whose keys come by here, in order; the own ones first."""
        size = self.keys.contexts
        others = [(self.rank - step) % size for step in range(1, size)]
        return (self.own, *(source for source in others if self.rank in self.way(source)))

    def blocks(self, source: int) -> tuple[Block, ...]:
        """What this rank's queries see of `source`'s keys."""
        return _blocks(self.queries, self.keys, self.is_causal, self.rank, source)

    def way(self, source: int) -> tuple[int, ...]:
        """The ranks that see a rank's keys, in the order in which they have them; without itself."""
        return _way(self.queries, self.keys, self.is_causal, source)

    def before(self, source: int) -> int:
        """From whom this rank has another's keys."""
        way = (source, *self.way(source))
        return way[way.index(self.rank) - 1]

    def after(self, source: int) -> int | None:
        """To whom this rank gives them; None where it is the last who sees them."""
        if self.keys.contexts == 1:
            return None
        way = (source, *self.way(source))
        at = way.index(self.rank) + 1
        return way[at] if at < len(way) else None

    def is_first(self, source: int) -> bool:
        """Whether this rank is the first to see them, behind their own."""
        return self.way(source)[0] == self.rank


@functools.lru_cache(maxsize=1024)
def _blocks(queries: Placement, keys: Placement, is_causal: bool, rank: int, source: int) -> tuple[Block, ...]:
    return visible_blocks(queries.runs(rank), keys.runs(source), is_causal=is_causal)


@functools.lru_cache(maxsize=1024)
def _way(queries: Placement, keys: Placement, is_causal: bool, source: int) -> tuple[int, ...]:
    others = [(source + step) % keys.contexts for step in range(1, keys.contexts)]
    return tuple(rank for rank in others if _blocks(queries, keys, is_causal, rank, source))
