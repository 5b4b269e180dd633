"""Which parameters lie side by side in one flat tensor, and where: a bucket is what is gathered and reduced at once.

    bucket of 3 parameters, 4 ranks      w0 w0 w0 w0 w0 w0 w0 w0 │b0 b0 · · │w1 w1 w1 w1 …   · fills up to ALIGNMENT
    rank 0 has part 0, rank 1 part 1     [   part 0   ][   part 1   ][   part 2   ][ part 3 ]

Buckets follow the order in which units are called, so that one is gathered for a unit or for some small ones. Numbers
and names; refuses to know tensors and ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

__all__ = ["ALIGNMENT", "BUCKET_BYTES", "BucketPlan", "Item", "Run", "bucket_bytes_of", "plan_buckets"]

ALIGNMENT = 16  # elements: products read vectors of as many
BUCKET_BYTES = 4 * 2**20
_LEAST_BUCKETS = 8  # of a model that is smaller than so many buckets


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A parameter to be placed. `like`: what all of a bucket have in common; `units`: in whose bodies it is read, none
    where the code between units reads it."""

    name: str
    numel: int
    itemsize: int
    like: Hashable
    units: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The elements [start, start + numel) of a parameter, which stand at `at` of a flat tensor."""

    start: int
    numel: int
    at: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BucketPlan:
    """Names with the place of each one's first element; `numel` is a multiple of the ranks. `units`: see `Item`."""

    names: tuple[str, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    numel: int
    like: Hashable
    units: frozenset[str]

    def runs(self, rank: int, size: int) -> dict[str, Run]:
        """What rank `rank` of `size` has of each parameter; those of which it has nothing are left out."""
        part = self.numel // size
        first, last = rank * part, (rank + 1) * part
        found: dict[str, Run] = {}
        for name, start, length in zip(self.names, self.starts, self.sizes, strict=True):
            begin, end = max(first, start), min(last, start + length)
            if begin < end:
                found[name] = Run(start=begin - start, numel=end - begin, at=begin - first)
        return found


def bucket_bytes_of(total_bytes: int) -> int:
    """When a bucket of a model that has so many bytes of parameters on a rank is closed."""
    return min(BUCKET_BYTES, total_bytes // _LEAST_BUCKETS)


def plan_buckets(items: Sequence[Item], *, multiple: int, bucket_bytes: int | None = None) -> list[BucketPlan]:
    """Buckets of `items`, which are in the order of their units, whose lengths are multiples of `multiple` ranks.

    A bucket is closed once it has `bucket_bytes`, and is never closed inside a unit: what a unit reads is gathered at
    once. What several units read, or none, has a bucket of its own. Ranks that hold different parameters besides those
    that they sum together are given the same `bucket_bytes`.
    """
    if bucket_bytes is None:
        bucket_bytes = bucket_bytes_of(sum(item.numel * item.itemsize for item in items))
    alike: dict[Hashable, list[Item]] = {}
    for item in items:
        shared = item.units if len(item.units) != 1 else frozenset({""})
        alike.setdefault((item.like, shared), []).append(item)
    plans: list[BucketPlan] = []
    for own in alike.values():
        filled: list[Item] = []
        for item in own:
            full = max(sum(each.numel * each.itemsize for each in filled), item.numel * item.itemsize) >= bucket_bytes
            if filled and full and item.units != filled[-1].units:
                plans.append(_plan(filled, multiple))
                filled = []
            filled.append(item)
        plans.append(_plan(filled, multiple))
    place = {item.name: number for number, item in enumerate(items)}
    return sorted(plans, key=lambda plan: place[plan.names[0]])


def _plan(items: Sequence[Item], multiple: int) -> BucketPlan:
    starts: list[int] = []
    end = 0
    for item in items:
        starts.append(end)
        end += -(-item.numel // ALIGNMENT) * ALIGNMENT
    whole = ALIGNMENT * multiple
    return BucketPlan(
        names=tuple(item.name for item in items),
        starts=tuple(starts),
        sizes=tuple(item.numel for item in items),
        numel=-(-end // whole) * whole,
        like=items[0].like,
        units=frozenset().union(*(item.units for item in items)),
    )
