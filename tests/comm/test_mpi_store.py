"""What a store answers, and to what it answers only later: without MPI."""

from __future__ import annotations

from shardwise.comm.mpi_store import Kept


def test_a_key_is_answered_when_it_is_there() -> None:
    kept = Kept()
    assert kept.answer(("get", "key")) is None
    assert kept.answer(("wait", ("key", "other"))) is None
    kept.answer(("set", "key", b"value"))
    assert kept.answer(("get", "key")) == (b"value",)
    assert kept.answer(("wait", ("key", "other"))) is None
    kept.answer(("set", "other", b""))
    assert kept.answer(("wait", ("key", "other"))) == (True,)


def test_numbers_are_added_up_from_nothing() -> None:
    kept = Kept()
    assert kept.answer(("add", "count", 3)) == (3,)
    assert kept.answer(("add", "count", -1)) == (2,)
    assert kept.answer(("get", "count")) == (b"2",)


def test_a_value_is_exchanged_only_where_it_is_what_was_expected() -> None:
    kept = Kept()
    assert kept.answer(("compare_set", "first", b"", b"rank 1")) == (b"rank 1",)
    assert kept.answer(("compare_set", "first", b"", b"rank 2")) == (b"rank 1",)
    assert kept.answer(("compare_set", "first", b"rank 1", b"rank 2")) == (b"rank 2",)
    assert kept.answer(("compare_set", "none", b"expected", b"new")) == (b"expected",)


def test_keys_are_counted_looked_for_and_deleted() -> None:
    kept = Kept()
    kept.answer(("set", "a", b"1"))
    assert kept.answer(("check", ("a", "b"))) == (False,)
    assert kept.answer(("num_keys",)) == (1,)
    assert kept.answer(("delete_key", "a")) == (True,)
    assert kept.answer(("delete_key", "a")) == (False,)
    assert kept.answer(("num_keys",)) == (0,)
