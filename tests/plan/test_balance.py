"""The cut of a row of weights is the best one there is: compared with all of them."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.plan.balance import balanced_ends, evened_ends


def all_cuts(n, num_parts):
    for inner in combinations(range(1, n), num_parts - 1):
        yield [*inner, n]


def score(ends, weights, traffic, counts):
    """(heaviest, traffic, squares), or None where a part holds nothing that counts."""
    bounds = list(pairwise([0, *ends]))
    if not all(any(counts[a:b]) for a, b in bounds):
        return None
    loads = [sum(weights[a:b]) for a, b in bounds]
    return max(loads), sum(traffic[a] for a, _ in bounds[1:]), sum(load * load for load in loads)


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_is_lighter_nor_of_less_traffic_nor_more_even(seed) -> None:
    draw = random.Random(seed)
    n = draw.randint(3, 9)
    num_parts = draw.randint(1, 3)
    weights = [draw.randint(0, 4) for _ in range(n)]
    traffic = [draw.randint(1, 3) for _ in range(n)]
    counts = [draw.random() < 0.7 for _ in range(n)]
    counts[:3] = [True] * 3
    scores = [score(ends, weights, traffic, counts) for ends in all_cuts(n, num_parts)]
    best = min(found for found in scores if found is not None)
    assert score(balanced_ends(weights, traffic, counts, num_parts), weights, traffic, counts) == best


def test_a_row_is_cut_where_the_heaviest_part_is_lightest() -> None:
    assert balanced_ends([1, 3, 3, 3, 2], [0] * 5, [True] * 5, 2) == [3, 5]


def test_of_equal_cuts_the_one_of_least_traffic_is_taken() -> None:
    assert balanced_ends([4, 1, 1, 4], [0, 9, 9, 1], [True] * 4, 2) == [2, 4]  # 5 | 5 whatever crosses
    assert balanced_ends([3, 0, 3], [0, 9, 1], [True] * 3, 2) == [2, 3]
    assert balanced_ends([3, 0, 3], [0, 1, 9], [True] * 3, 2) == [1, 3]


def test_every_part_holds_something_that_counts() -> None:
    assert balanced_ends([9, 9, 1, 1], [0] * 4, [False, True, True, True], 2) == [2, 4]  # not 9 | 11


#   elements  1 1 1 1 1 1 1 1 1.5    parts owned as a V: 0 1 1 0
def parts(ends, weights):
    return [sum(weights[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def test_a_heavy_part_leaves_the_rank_that_has_another_one() -> None:
    weights = [1.0] * 8 + [1.5]
    ends = evened_ends([3, 5, 7, 9], weights, [1.0] * 9, [True] * 9, (0, 1, 1, 0))
    loads = parts(ends, weights)
    assert max(loads[0] + loads[3], loads[1] + loads[2]) == 5.0
    assert evened_ends(ends, weights, [1.0] * 9, [True] * 9, (0, 1, 1, 0)) == ends


def test_no_cut_moves_to_where_more_crosses_or_leaves_a_part_empty() -> None:
    weights = [1.0] * 8 + [1.5]
    dear = [1.0] * 9
    for start in (2, 4, 6, 8):
        dear[start] = 2.0
    assert evened_ends([3, 5, 7, 9], weights, dear, [True] * 9, (0, 1, 1, 0)) == [3, 5, 7, 9]
    assert evened_ends([1, 2, 3, 4], [9.0, 1.0, 1.0, 1.0], [1.0] * 4, [True] * 4, (0, 1, 1, 0)) == [1, 2, 3, 4]


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=8, max_size=16),
    owners=st.sampled_from([(0, 1, 1, 0), (0, 1, 0, 1), (0, 1, 2, 2, 1, 0), (0, 1, 0, 1, 0, 1)]),
)
def test_the_heaviest_rank_is_never_heavier_than_before(weights, owners) -> None:
    even = [1.0] * len(weights)
    before = balanced_ends(weights, even, [True] * len(weights), len(owners))
    after = evened_ends(before, weights, even, [True] * len(weights), owners)

    def heaviest(ends):
        loads = parts(ends, weights)
        return max(sum(load for load, owner in zip(loads, owners, strict=True) if owner == r) for r in set(owners))

    assert heaviest(after) <= heaviest(before) * (1 + 1e-6)
    assert after[-1] == len(weights)
    assert all(a < b for a, b in zip([0, *after], after, strict=False))
