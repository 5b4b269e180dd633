"""Slices as values: who holds what, who counts it, what several hold."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from shardwise.describe.proof import Proof
from shardwise.describe.tensor import Slice, TensorPlan, UnitPlan
from shardwise.errors import LayoutError


def test_packed_projections_are_divided_part_by_part() -> None:
    qkv = Slice.even(0, 12, 2, parts=(4, 4, 4))

    assert qkv.ranges == (((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12)))
    assert qkv.local_size(0) == qkv.local_size(1) == 6
    assert qkv.shared == ()


def test_what_several_ranks_hold_is_counted_by_the_lowest() -> None:
    # 2 key heads of size 2 on 4 ranks
    keys = Slice(dim=0, size=4, ranges=(((0, 2),), ((0, 2),), ((2, 4),), ((2, 4),)))

    assert keys.shared == ((0, 4),)
    assert [keys.owned(rank) for rank in range(4)] == [((0, 2),), (), ((2, 4),), ()]


def test_queries_of_its_own_beside_shared_keys() -> None:
    # [q0 q1 k] on 2 ranks: k on both
    fused = Slice(dim=0, size=3, ranges=(((0, 1), (2, 3)), ((1, 3),)))

    assert fused.shared == ((2, 3),)
    assert fused.owned(1) == ((1, 2),)


def test_an_index_that_nobody_holds_is_refused() -> None:
    with pytest.raises(LayoutError, match="1 of 4 are not"):
        Slice(dim=0, size=4, ranges=(((0, 2),), ((2, 3),)))


def test_parts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"\(3, 3\) of 6 are divided evenly among 2"):
        Slice.even(0, 6, 2, parts=(3, 3))


def test_equal_plans_have_one_digest_whatever_their_order_and_proof() -> None:
    rows, columns = Slice.even(1, 8, 2), Slice.even(0, 8, 2)
    one = UnitPlan(slices={"o": rows, "q": columns}, partial=frozenset("abcdef"))
    other = UnitPlan(slices={"q": columns, "o": rows}, partial=frozenset("fedcba"), proof=Proof(tp=2))

    assert one.digest == other.digest
    assert one.digest != dataclasses.replace(one, partial=frozenset("abcde")).digest
    assert one.digest != dataclasses.replace(one, slices={"o": columns, "q": columns}).digest


def test_a_digest_is_the_same_in_every_process() -> None:
    told = "from shardwise.describe.tensor import UnitPlan as U; print(U(partial=frozenset('abcdef')).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", told], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("share", "told"), [(1.0, "100%"), (0.9972, "99.7%"), (0.99999, "99.9%"), (0.5, "50%"), (0.0, "0%")]
)
def test_only_all_of_it_is_told_as_all(share: float, told: str) -> None:
    plan = TensorPlan(tp=2, units={}, reasons={}, sharded_share=share, flops_share=share)
    assert plan.lines()[0].endswith(f": {told} of the blocks' matrix products, {told} of a forward's flops")


def test_a_plan_answers_for_full_names() -> None:
    rows = Slice.even(1, 8, 2)
    unit = UnitPlan(slices={"o.weight": rows}, partial=frozenset({"norm.weight"}))
    plan = TensorPlan(tp=2, units={"layers.1": unit}, reasons={}, sharded_share=0.5)

    assert plan.slice_of("layers.1.o.weight") is rows
    assert plan.slice_of("layers.10.o.weight") is None
    assert plan.is_partial("layers.1.norm.weight")
    assert not plan.is_partial("norm.weight")
