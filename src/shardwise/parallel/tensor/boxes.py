"""Where the parts of a divided tensor lie in the whole: boxes that checkpoints name. Pure arithmetic on sizes.

whole  q0 q1 k0 k1 v0 v1      rank 1:  (whole 1, own 0, length 1)  (whole 3, own 1, length 1)  (whole 5, own 2, …)
"""

from __future__ import annotations

import dataclasses

from shardwise.describe.tensor import Slice

__all__ = ["Box", "boxes"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A run of indices along a slice's dim: where it starts in the whole tensor and in the rank's part."""

    whole: int
    own: int
    length: int


def boxes(part: Slice, rank: int, *, size: int, owned: bool) -> tuple[Box, ...]:
    """The runs of `rank` in a whole tensor with `size` elements along the dim, a multiple of the slice's; with `owned`
    only what no lower rank holds."""
    counted = {i for start, stop in part.owned(rank) for i in range(start, stop)} if owned else None
    found: list[Box] = []
    own = 0
    for other in range(size // part.size):
        for start, stop in part.ranges[rank]:
            for index in range(start, stop):
                at = other * part.size + index
                if counted is None or index in counted:
                    last = found[-1] if found else None
                    if last is not None and last.whole + last.length == at and last.own + last.length == own:
                        found[-1] = Box(whole=last.whole, own=last.own, length=last.length + 1)
                    else:
                        found.append(Box(whole=at, own=own, length=1))
                own += 1
    return tuple(found)
