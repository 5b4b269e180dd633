"""Where a rank stands in a layout, and which ranks stand together on each axis. Arithmetic alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = ["Place"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this rank stands: its stage, its replica, its shard. rank = (stage * dp + replica) * tp + shard.

    `dp` are all replicas, each with its share of the batch; in turn, replica % ep, they hold other experts.
    """

    rank: int
    dp: int
    pp: int
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def stage(self) -> int:
        return self.rank // self.tp // self.dp

    @property
    def replica(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def shard(self) -> int:
        return self.rank % self.tp

    @property
    def expert(self) -> int:
        """Which of the ranks that divide the experts this one is."""
        return self.replica % self.ep

    def rank_of(self, stage: int) -> int:
        """The rank of a stage of this rank's replica and shard."""
        return (stage * self.dp + self.replica) * self.tp + self.shard

    def ranks_holding(self, stages: Sequence[int], shards: Sequence[int], expert: int | None = None) -> list[int]:
        """All ranks of some stages and shards, of every replica or of those that hold the same experts."""
        return [
            (stage * self.dp + replica) * self.tp + shard
            for stage in stages
            for replica in (range(self.dp) if expert is None else range(expert, self.dp, self.ep))
            for shard in shards
        ]

    def ranks_dividing_experts(self) -> list[list[int]]:
        """The groups of the expert axis: for every stage, replica of all experts and shard, who divides them."""
        return [
            [(stage * self.dp + first + expert) * self.tp + shard for expert in range(self.ep)]
            for stage in range(self.pp)
            for first in range(0, self.dp, self.ep)
            for shard in range(self.tp)
        ]

    def ranks_sharing(self) -> list[list[int]]:
        """The groups of the tensor axis: for every stage and replica, its shards."""
        return [
            [(stage * self.dp + replica) * self.tp + shard for shard in range(self.tp)]
            for stage in range(self.pp)
            for replica in range(self.dp)
        ]
