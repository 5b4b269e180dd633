"""Where a rank stands in a layout, and which ranks stand together on each axis. Arithmetic alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

__all__ = ["Place", "owners_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this rank stands: its position in the pipeline, its replica, its shard.

    rank = (position * dp + replica) * tp + shard. `dp` are all replicas, each with its share of the batch; in turn,
    replica % ep, they hold other experts. `owner_of[s]` is the position that owns stage s; without it, stage s is at
    position s.
    """

    rank: int
    dp: int
    pp: int
    tp: int = 1
    ep: int = 1
    owner_of: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "owner_of", tuple(self.owner_of) or tuple(range(self.pp)))
        assert set(self.owner_of) == set(range(self.pp)), (self.owner_of, self.pp)

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def num_stages(self) -> int:
        return len(self.owner_of)

    @property
    def position(self) -> int:
        """Of this rank in the pipeline."""
        return self.rank // self.tp // self.dp

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that this rank owns, ascending."""
        return tuple(stage for stage, owner in enumerate(self.owner_of) if owner == self.position)

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

    def owns_any(self, stages: Collection[int]) -> bool:
        """Whether one of `stages` is on this rank."""
        return any(self.owner_of[stage] == self.position for stage in stages)

    def positions_of(self, stages: Collection[int]) -> tuple[int, ...]:
        """Who owns some stages, ascending, each once."""
        return tuple(sorted({self.owner_of[stage] for stage in stages}))

    def rank_of(self, stage: int) -> int:
        """The rank of a stage of this rank's replica and shard."""
        return (self.owner_of[stage] * self.dp + self.replica) * self.tp + self.shard

    def pipeline(self) -> list[int]:
        """The ranks of this rank's replica and shard, by position."""
        return [(position * self.dp + self.replica) * self.tp + self.shard for position in range(self.pp)]

    def ranks_holding(self, positions: Sequence[int], shards: Sequence[int], expert: int | None = None) -> list[int]:
        """All ranks of some positions and shards, of every replica or of those that hold the same experts."""
        return [
            (position * self.dp + replica) * self.tp + shard
            for position in positions
            for replica in (range(self.dp) if expert is None else range(expert, self.dp, self.ep))
            for shard in shards
        ]

    def ranks_dividing_experts(self) -> list[list[int]]:
        """The groups of the expert axis: for every position, replica of all experts and shard, who divides them."""
        return [
            [(position * self.dp + first + expert) * self.tp + shard for expert in range(self.ep)]
            for position in range(self.pp)
            for first in range(0, self.dp, self.ep)
            for shard in range(self.tp)
        ]

    def ranks_sharing(self) -> list[list[int]]:
        """The groups of the tensor axis: for every position and replica, its shards."""
        return [
            [(position * self.dp + replica) * self.tp + shard for shard in range(self.tp)]
            for position in range(self.pp)
            for replica in range(self.dp)
        ]


def owners_of(ranks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """[stage]: its position, from the stages of every position."""
    owner = {stage: position for position, stages in enumerate(ranks) for stage in stages}
    return tuple(owner[stage] for stage in range(len(owner)))
