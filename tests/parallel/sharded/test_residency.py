"""Whose parameters are whole: those of the unit that computes and of the next one, each gathered once on the way."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from shardwise.parallel.sharded.residency import Residency


@dataclasses.dataclass(eq=False)
class Counted:
    """A bucket that counts its gathers."""

    stages: tuple[int, ...] = (0,)
    frees: bool = True
    is_whole: bool = False
    gathers: int = 0

    def gather(self) -> None:
        self.gathers += not self.is_whole
        self.is_whole = True

    def wait(self) -> None:
        pass

    def free(self) -> None:
        self.is_whole = False


def test_units_that_share_a_bucket_do_not_gather_the_next_one_twice() -> None:
    buckets = [Counted() for _ in range(3)]
    residency = Residency(cast(Any, buckets))
    for bucket in buckets:
        for _ in range(2):  # two units of each
            residency.turn(cast(Any, [bucket]))
            assert sum(each.is_whole for each in buckets) <= 2
    residency.rest()
    for bucket in reversed(buckets):
        for _ in range(2):
            residency.turn(cast(Any, [bucket]), backward=True)
    residency.rest()
    assert [bucket.gathers for bucket in buckets] == [2, 2, 2]
    assert not any(bucket.is_whole for bucket in buckets)
