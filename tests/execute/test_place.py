"""Places of ranks, drawn: who stands together on each axis."""

from __future__ import annotations

import pytest

from shardwise.execute.place import Place, owners_of

#                replica 0   replica 1   replica 2   replica 3
#   position 0    0   1       2   3       4   5       6   7
#   position 1    8   9      10  11      12  13      14  15
PLACES = [Place(rank=rank, dp=4, pp=2, tp=2, ep=2) for rank in range(16)]


def test_a_rank_stands_where_the_picture_says() -> None:
    eleven = PLACES[11]
    assert (eleven.position, eleven.replica, eleven.shard, eleven.expert) == (1, 1, 1, 1)
    assert eleven.world_size == 16
    assert [eleven.rank_of(stage) for stage in range(2)] == [3, 11] == eleven.pipeline()
    assert eleven.stages == (1,)


def test_in_a_v_the_first_and_the_last_stage_are_on_the_first_rank() -> None:
    first, second = (Place(rank=rank, dp=1, pp=2, owner_of=owners_of(((0, 3), (1, 2)))) for rank in range(2))
    assert (first.num_stages, first.stages, second.stages) == (4, (0, 3), (1, 2))
    assert [second.rank_of(stage) for stage in range(4)] == [0, 1, 1, 0]
    assert first.owns_any((2, 3))
    assert not first.owns_any((1, 2))


def test_two_stages_of_a_rank_are_one_holder() -> None:
    place = Place(rank=0, dp=2, pp=2, owner_of=(0, 1, 1, 0))
    assert place.positions_of((0, 3)) == (0,)
    assert place.positions_of((0, 1, 2)) == (0, 1)
    assert place.ranks_holding(place.positions_of((0, 3)), (0,)) == [0, 1]


def test_shards_of_a_position_and_replica_share_units() -> None:
    assert PLACES[0].ranks_sharing() == [[rank, rank + 1] for rank in range(0, 16, 2)]


def test_neighbouring_replicas_divide_experts() -> None:
    dividing = [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert sorted(PLACES[0].ranks_dividing_experts()) == dividing


@pytest.mark.parametrize(
    "expert, ranks",
    [(None, [1, 3, 5, 7, 9, 11, 13, 15]), (0, [1, 5, 9, 13]), (1, [3, 7, 11, 15])],
)
def test_a_weight_is_on_all_replicas_and_an_expert_on_those_that_have_it(expert: int | None, ranks: list[int]) -> None:
    assert PLACES[0].ranks_holding((0, 1), (1,), expert) == ranks


@pytest.mark.parametrize("place", PLACES)
def test_every_rank_is_in_one_group_of_each_axis(place: Place) -> None:
    for groups in (place.ranks_sharing(), place.ranks_dividing_experts()):
        assert sum(place.rank in ranks for ranks in groups) == 1


def test_ranks_that_divide_states_differ_in_their_part_alone() -> None:
    places = [Place(rank=rank, dp=8, pp=1, ep=2, fsdp=2, cp=2, tp=2) for rank in range(32)]
    groups = places[0].ranks_dividing_states()
    assert sorted(rank for group in groups for rank in group) == list(range(32))
    for place in places:
        own = next(group for group in groups if place.rank in group)
        assert own == place.parts()
        assert [places[rank].part for rank in own] == [0, 1]
        assert len({(p.expert, p.context, p.shard, p.replica // 4) for p in (places[rank] for rank in own)}) == 1


def test_contexts_are_between_replicas_and_shards() -> None:
    place = Place(rank=13, dp=2, pp=2, cp=2, tp=2)
    assert (place.position, place.replica, place.context, place.shard) == (1, 1, 0, 1)
    assert (place.contexts(), place.shards(), place.pipeline()) == ([13, 15], [12, 13], [5, 13])
    assert [13, 15] in place.ranks_dividing_sequences()
