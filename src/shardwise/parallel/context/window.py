"""A run of a divided sequence: logits without the last, say. Its tokens stay where they are. Numbers alone.

a sequence of 8, zigzag on 2 ranks    0 0 1 1 1 1 0 0
its first 7                           0 0 1 1 1 1 0
"""

from __future__ import annotations

import dataclasses

from shardwise.parallel.context.placement import Placement

__all__ = ["Window"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Placement):
    """Tokens [first, first + size) of a sequence of `of` tokens."""

    first: int
    of: int

    def runs(self, context: int) -> tuple[tuple[int, int], ...]:
        """[start, stop) in the window, none of them empty."""
        stop = self.first + self.size
        whole = Placement(size=self.of, contexts=self.contexts, zigzag=self.zigzag)
        clipped = [(max(a, self.first), min(b, stop)) for a, b in whole.runs(context)]
        return tuple((a - self.first, b - self.first) for a, b in clipped if a < b)
