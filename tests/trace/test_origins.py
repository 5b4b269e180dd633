"""Where a tensor comes from: the value it was named, the unit it was born in, or the last write into its memory.

name(x, 0)   write(x, 1)   read x.view() -> {1}   x, named before the write -> {0, 1}
"""

from __future__ import annotations

import gc

import torch

from shardwise.trace.origins import Born, Origins


def test_a_tensor_that_nobody_made_is_free() -> None:
    origins = Origins()
    batch = torch.ones(4)
    assert origins.of(batch) == set()
    assert not origins.known(batch)
    assert origins.value_of(batch) is None


def test_a_named_tensor_is_its_value_and_so_is_a_view_of_its_memory() -> None:
    origins = Origins()
    made = torch.ones(4)
    origins.name(made, 7)
    assert origins.of(made) == {7}
    assert origins.of(made[:2]) == {7}
    assert origins.value_of(made) == 7
    assert origins.value_of(made[:2]) is None  # another object


def test_a_tensor_born_in_a_unit_is_the_units_until_it_is_named() -> None:
    origins = Origins()
    inside = torch.ones(4)
    origins.bear(inside, 3)
    assert origins.of(inside) == origins.of(inside.view(2, 2)) == {Born(3)}
    origins.name(inside, 5)
    assert origins.of(inside) == {5}
    assert origins.of(inside.view(2, 2)) == {5}


def test_a_view_born_in_a_unit_stays_with_the_memory_that_was_there_before() -> None:
    origins = Origins()
    outside = torch.ones(4)
    origins.name(outside, 1)
    origins.bear(outside[:2], 3)
    assert origins.of(outside[:2]) == {1}


def test_a_view_that_glue_made_is_a_value_of_its_own_and_its_memory_is_not() -> None:
    origins = Origins()
    parameter = torch.ones(4)
    view = parameter[:2]
    origins.name(view, 2, fresh=False)
    assert origins.of(view) == {2}
    assert origins.of(parameter) == set()


def test_a_write_is_read_by_those_who_were_named_before_it_and_by_views_of_the_memory() -> None:
    origins = Origins()
    made, old_view = torch.ones(4), None
    origins.name(made, 0)
    old_view = made[:2]
    origins.name(old_view, 1, fresh=False)
    origins.write(made, 2)
    assert origins.of(made) == {0, 2}
    assert origins.of(old_view) == {1, 2}
    assert origins.of(made[2:]) == {2}


def test_who_is_named_after_a_write_does_not_read_it_again() -> None:
    origins = Origins()
    made = torch.ones(4)
    origins.name(made, 0)
    origins.write(made, 1)
    origins.name(made, 1)
    assert origins.of(made) == {1}


def test_of_several_writes_the_last_stands_for_all() -> None:
    origins = Origins()
    made = torch.ones(4)
    origins.name(made, 0)
    origins.write(made, 1)
    origins.write(made, 2)
    assert origins.of(made.view(2, 2)) == {2}
    (writers,) = origins.written().values()
    assert writers == [1, 2]


def test_a_write_into_free_memory_makes_it_known() -> None:
    origins = Origins()
    buffer = torch.zeros(4)
    origins.write(buffer, 4)
    assert origins.known(buffer)
    assert origins.of(buffer) == {4}


def test_an_alias_is_what_its_base_was_named() -> None:
    origins = Origins()
    base, alias = torch.ones(4), torch.ones(4)
    origins.name(base, 6)
    origins.alias(alias, base)
    assert origins.of(alias) == {6}


def test_memory_that_was_seen_is_not_used_again_for_other_tensors() -> None:
    origins = Origins()
    for node in range(50):
        inside = torch.ones(1000)
        assert not origins.known(inside)
        origins.bear(inside, node)
        del inside
        gc.collect(0)


def test_a_tensor_without_memory_has_no_key() -> None:
    sparse = torch.eye(3).to_sparse()
    origins = Origins()
    assert origins.storage(sparse) is None
    origins.name(sparse, 1)
    origins.write(sparse, 2)  # cannot be followed, and is no error
    assert origins.of(sparse) == {1}
