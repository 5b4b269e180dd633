"""Where a rank stands in a layout, and which ranks stand together on each axis. Arithmetic alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

__all__ = ["Place", "owners_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this rank stands: its position in the pipeline, its replica, its part of every sequence, its shard.

    rank = ((position * dp + replica) * cp + context) * tp + shard. `dp` are all replicas, each with its share of the
    batch: replica = (outer * fsdp + part) * ep + expert. Those that differ in `part` alone divide the state of
    training, those that differ in `expert` alone hold other experts. `owner_of[s]` is the position that owns stage s;
    without it, stage s is at position s.
    """

    rank: int
    dp: int
    pp: int
    tp: int = 1
    ep: int = 1
    fsdp: int = 1
    cp: int = 1
    owner_of: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "owner_of", tuple(self.owner_of) or tuple(range(self.pp)))
        assert set(self.owner_of) == set(range(self.pp)), (self.owner_of, self.pp)
        assert self.dp % (self.fsdp * self.ep) == 0, (self.dp, self.fsdp, self.ep)

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def num_stages(self) -> int:
        return len(self.owner_of)

    @property
    def position(self) -> int:
        """Of this rank in the pipeline."""
        return self.rank // (self.tp * self.cp * self.dp)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that this rank owns, ascending."""
        return tuple(stage for stage, owner in enumerate(self.owner_of) if owner == self.position)

    @property
    def replica(self) -> int:
        return self.rank // (self.tp * self.cp) % self.dp

    @property
    def context(self) -> int:
        """Which part of every sequence is this rank's."""
        return self.rank // self.tp % self.cp

    @property
    def shard(self) -> int:
        return self.rank % self.tp

    @property
    def expert(self) -> int:
        """Which of the ranks that divide the experts this one is."""
        return self.replica % self.ep

    @property
    def part(self) -> int:
        """Which of the ranks that divide the state of training this one is."""
        return self.replica // self.ep % self.fsdp

    def owns_any(self, stages: Collection[int]) -> bool:
        """Whether one of `stages` is on this rank."""
        return any(self.owner_of[stage] == self.position for stage in stages)

    def positions_of(self, stages: Collection[int]) -> tuple[int, ...]:
        """Who owns some stages, ascending, each once."""
        return tuple(sorted({self.owner_of[stage] for stage in stages}))

    def rank_of(self, stage: int) -> int:
        """The rank of a stage of this rank's replica, context and shard."""
        return self._at(position=self.owner_of[stage])

    def pipeline(self) -> list[int]:
        """The ranks of this rank's replica, context and shard, by position."""
        return [self._at(position=position) for position in range(self.pp)]

    def contexts(self) -> list[int]:
        """The ranks that divide this rank's sequences."""
        return [self._at(context=context) for context in range(self.cp)]

    def shards(self) -> list[int]:
        """The ranks that divide this rank's units."""
        return [self._at(shard=shard) for shard in range(self.tp)]

    def parts(self) -> list[int]:
        """The ranks that divide this rank's state of training."""
        first = self.replica - self.part * self.ep
        return [self._at(replica=first + part * self.ep) for part in range(self.fsdp)]

    def ranks_holding(self, positions: Sequence[int], shards: Sequence[int], expert: int | None = None) -> list[int]:
        """All ranks of some positions and shards, of every context, of every replica or of those that hold the same
        experts."""
        return [
            self._at(position=position, replica=replica, context=context, shard=shard)
            for position in positions
            for replica in (range(self.dp) if expert is None else range(expert, self.dp, self.ep))
            for context in range(self.cp)
            for shard in shards
        ]

    def ranks_dividing_experts(self) -> list[list[int]]:
        """The groups of the expert axis: for every position, replica of all experts, context and shard, who divides
        them."""
        return [
            [self._at(position=position, replica=first + e, context=context, shard=shard) for e in range(self.ep)]
            for position in range(self.pp)
            for first in range(0, self.dp, self.ep)
            for context in range(self.cp)
            for shard in range(self.tp)
        ]

    def ranks_dividing_states(self) -> list[list[int]]:
        """The groups of the fsdp axis: for every position, outer replica, expert, context and shard, its parts."""
        size = self.fsdp * self.ep
        return [
            [self._at(position=position, replica=first + part, context=c, shard=s) for part in range(0, size, self.ep)]
            for position in range(self.pp)
            for outer in range(0, self.dp, size)
            for first in range(outer, outer + self.ep)
            for c in range(self.cp)
            for s in range(self.tp)
        ]

    def ranks_dividing_sequences(self) -> list[list[int]]:
        """The groups of the context axis: for every position, replica and shard, its contexts."""
        return [
            [self._at(position=position, replica=replica, context=c, shard=shard) for c in range(self.cp)]
            for position in range(self.pp)
            for replica in range(self.dp)
            for shard in range(self.tp)
        ]

    def ranks_replicating(self) -> list[list[int]]:
        """The groups of the data axis: for every position, context and shard, its replicas."""
        return [
            [self._at(position=position, replica=replica, context=c, shard=shard) for replica in range(self.dp)]
            for position in range(self.pp)
            for c in range(self.cp)
            for shard in range(self.tp)
        ]

    def ranks_sharing(self) -> list[list[int]]:
        """The groups of the tensor axis: for every position, replica and context, its shards."""
        return [
            [self._at(position=position, replica=replica, context=context, shard=s) for s in range(self.tp)]
            for position in range(self.pp)
            for replica in range(self.dp)
            for context in range(self.cp)
        ]

    def _at(
        self,
        *,
        position: int | None = None,
        replica: int | None = None,
        context: int | None = None,
        shard: int | None = None,
    ) -> int:
        """The rank that stands where this one does, but for what is given."""
        p = self.position if position is None else position
        r = self.replica if replica is None else replica
        c = self.context if context is None else context
        return ((p * self.dp + r) * self.cp + c) * self.tp + (self.shard if shard is None else shard)


def owners_of(ranks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """[stage]: its position, from the stages of every position."""
    owner = {stage: position for position, stages in enumerate(ranks) for stage in stages}
    return tuple(owner[stage] for stage in range(len(owner)))
