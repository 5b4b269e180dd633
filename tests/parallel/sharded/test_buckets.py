"""Where parameters stand in flat tensors, and which elements are whose."""

from __future__ import annotations

import pytest

from shardwise.parallel.sharded.buckets import ALIGNMENT, BucketPlan, Item, Run, plan_buckets


def item(name: str, numel: int, *units: str, like: object = "alike") -> Item:
    return Item(name=name, numel=numel, itemsize=4, like=like, units=frozenset(units))


def names(plans: list[BucketPlan]) -> list[tuple[str, ...]]:
    return [plan.names for plan in plans]


def test_a_bucket_is_closed_when_it_is_full_and_never_inside_a_unit() -> None:
    items = [item("a", 10, "u0"), item("b", 20, "u1"), item("c", 20, "u1"), item("d", 5, "u2"), item("e", 5, "u3")]
    assert names(plan_buckets(items, multiple=2, bucket_bytes=100)) == [("a", "b", "c"), ("d", "e")]


def test_a_large_parameter_does_not_wait_for_small_units_before_it() -> None:
    items = [item("norm", 10, "u0"), item("head", 1000, "u1")]
    assert names(plan_buckets(items, multiple=2, bucket_bytes=400)) == [("norm",), ("head",)]


def test_what_several_units_read_or_none_stands_apart_and_in_the_order_of_the_units() -> None:
    items = [item("gain", 4), item("table", 8, "embed", "head"), item("w", 8, "u0"), item("v", 8, "u1")]
    plans = plan_buckets(items, multiple=2, bucket_bytes=10**6)
    assert names(plans) == [("gain",), ("table",), ("w", "v")]
    assert [sorted(plan.units) for plan in plans] == [[], ["embed", "head"], ["u0", "u1"]]


def test_parameters_that_are_not_alike_do_not_share_a_bucket() -> None:
    items = [item("a", 4, "u"), item("b", 4, "u", like="other"), item("c", 4, "u")]
    assert names(plan_buckets(items, multiple=2, bucket_bytes=10**6)) == [("a", "c"), ("b",)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_element_is_in_the_part_of_one_rank(size: int) -> None:
    (plan,) = plan_buckets([item("a", 37, "u"), item("b", 5, "u"), item("c", 90, "u")], multiple=size)
    assert plan.numel % size == 0
    assert all(start % ALIGNMENT == 0 for start in plan.starts)
    for name, numel in zip(plan.names, plan.sizes, strict=True):
        runs = [runs[name] for rank in range(size) if name in (runs := plan.runs(rank, size))]
        assert [run.start for run in runs] == [sum(run.numel for run in runs[:i]) for i in range(len(runs))]
        assert sum(run.numel for run in runs) == numel


def test_a_rank_has_the_end_of_one_parameter_and_the_beginning_of_the_next() -> None:
    (plan,) = plan_buckets([item("a", 20, "u"), item("b", 20, "u")], multiple=2)
    assert (plan.starts, plan.numel) == ((0, 32), 64)
    assert plan.runs(0, 2) == {"a": Run(start=0, numel=20, at=0)}
    assert plan.runs(1, 2) == {"b": Run(start=0, numel=20, at=0)}
    assert plan.runs(1, 4) == {"a": Run(start=16, numel=4, at=0)}
