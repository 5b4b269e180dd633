"""When the parameters of which buckets are whole: those of the unit that computes and of the next one, or of a stage.

    forward     [u0] u1          gathered: the unit that runs; on its way: the bucket behind it
                 u0 [u1] u2      what no unit needs any more is freed before another is gathered
    backward            u1 [u2]

Every rank of the group goes through the same units in the same order, so that gathers meet. Knows buckets and whose
turn it is; refuses to know autograd and schedules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from shardwise.parallel.sharded.bucket import Bucket

__all__ = ["Residency"]


class Residency:
    """Gathers and frees `buckets`; those that do not free are always whole."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = [bucket for bucket in buckets if bucket.frees]
        self._place = {id(bucket): place for place, bucket in enumerate(self._buckets)}
        self._held: dict[int, int] = {}  # how often a bucket is held for longer than a unit's turn
        self._current: list[Bucket] = []
        self._expected: Bucket | None = None  # on its way

    def turn(self, needed: Sequence[Bucket], *, backward: bool = False) -> None:
        """A unit that needs these begins. Collective."""
        needed = [bucket for bucket in needed if bucket.frees]
        if not needed:
            return
        following = self._following(needed, backward)
        for bucket in (*self._current, *([self._expected] if self._expected is not None else [])):
            if bucket not in needed and bucket is not following:  # small units share one: it is on its way already
                self._free(bucket)
        self._current, self._expected = list(needed), None
        for bucket in needed:
            bucket.gather()
        if following is not None:
            following.gather()
            self._expected = following
        for bucket in needed:
            bucket.wait()

    def hold(self, buckets: Iterable[Bucket]) -> None:
        """Make these whole until `let_go`. Collective."""
        chosen = [bucket for bucket in buckets if bucket.frees]
        for bucket in chosen:
            self._held[id(bucket)] = self._held.get(id(bucket), 0) + 1
            bucket.gather()
        for bucket in chosen:
            bucket.wait()

    def let_go(self, buckets: Iterable[Bucket]) -> None:
        """The end of `hold`."""
        for bucket in buckets:
            if bucket.frees:
                self._held[id(bucket)] -= 1
                self._free(bucket)

    def rest(self) -> None:
        """No unit computes any more."""
        for bucket in (*self._current, *([self._expected] if self._expected is not None else [])):
            self._free(bucket)
        self._current, self._expected = [], None

    def _free(self, bucket: Bucket) -> None:
        if not self._held.get(id(bucket), 0):
            bucket.free()

    def _following(self, needed: Collection[Bucket], backward: bool) -> Bucket | None:
        """Which bucket of the same stage comes next, as the buckets stand."""
        places = [self._place[id(bucket)] for bucket in needed]
        place = min(places) - 1 if backward else max(places) + 1
        if not 0 <= place < len(self._buckets):
            return None
        found = self._buckets[place]
        return found if set(found.stages) & {stage for bucket in needed for stage in bucket.stages} else None
