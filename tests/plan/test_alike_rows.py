"""Rows that are alike have one kind, kinds stand in order, as sorting would find them."""

from __future__ import annotations

import numpy as np
import pytest

from shardwise.plan.alike_rows import alike_rows


def test_alike_rows_share_a_kind_and_the_first_of_them_is_told() -> None:
    first, kind = alike_rows([np.array([3, 7, 3, 3]), np.array([0, 1, 0, 2])])
    assert first.tolist() == [0, 3, 1]
    assert kind.tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("most", [3, 1000, 1 << 40])  # few numbers, some, and such as cannot be counted one by one
def test_kinds_are_those_that_sorting_finds(most) -> None:
    columns = [np.random.default_rng(seed).integers(0, most, 500) for seed in range(4)]
    columns[3] %= 2
    first, kind = alike_rows(columns)
    rows, where, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_index=True, return_inverse=True)
    assert np.array_equal(kind, inverse.reshape(-1))
    assert np.array_equal(first, where)
    assert np.array_equal(np.stack(columns, axis=1)[first], rows)


def test_a_table_without_rows_has_no_kinds() -> None:
    first, kind = alike_rows([np.zeros(0, dtype=np.int64)])
    assert len(first) == len(kind) == 0
