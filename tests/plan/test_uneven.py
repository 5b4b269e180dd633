"""Stages and shares by speed and memory: exact, compared with every way there is."""

from __future__ import annotations

import itertools
import random

import pytest

from shardwise.errors import LayoutError
from shardwise.plan.uneven import Kind, micro_batch_shares, uneven_stages


def brute_force(kinds, held, saved, micro_batches, in_order):
    """The least slowest place over every order of the devices and every partition that fits."""
    row = [index for index, kind in enumerate(kinds) for _ in range(kind.places)]
    places, units = len(row), len(held)
    best = float("inf")
    for order in {tuple(row)} if in_order else set(itertools.permutations(row)):
        for cuts in itertools.combinations(range(1, units), places - 1):
            bounds = [0, *cuts, units]
            slowest = 0.0
            for place, (start, end) in enumerate(itertools.pairwise(bounds)):
                kind = kinds[order[place]]
                kept = min(places - place, micro_batches)
                if sum(held[start:end]) + kept * sum(saved[start:end]) > kind.memory_bytes:
                    slowest = float("inf")
                slowest = max(slowest, sum(kind.seconds[start:end]))
            best = min(best, slowest)
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("in_order", [True, False])
def test_the_partition_is_the_best_of_all(seed, in_order) -> None:
    draw = random.Random(seed)
    units = draw.randint(4, 7)
    work = [draw.uniform(1, 3) for _ in range(units)]
    kinds = [
        Kind(seconds=tuple(work), places=draw.randint(1, 2), memory_bytes=draw.uniform(8, 20)),
        Kind(seconds=tuple(2 * each for each in work), places=draw.randint(1, 2), memory_bytes=draw.uniform(8, 20)),
    ]
    held, saved = [draw.uniform(1, 3) for _ in work], [draw.uniform(0.1, 1) for _ in work]
    expected = brute_force(kinds, held, saved, 4, in_order)
    if expected == float("inf"):
        with pytest.raises(LayoutError, match="no partition"):
            uneven_stages(kinds, held_bytes=held, saved_bytes=saved, num_micro_batches=4, in_order=in_order)
        return
    found = uneven_stages(kinds, held_bytes=held, saved_bytes=saved, num_micro_batches=4, in_order=in_order)
    assert found.seconds == pytest.approx(expected)
    assert found.ends[-1] == units
    assert len(found.ends) == len(found.kinds) == sum(kind.places for kind in kinds)


def test_a_device_of_twice_the_speed_gets_twice_the_units() -> None:
    slow, fast = (Kind(seconds=(each,) * 9, places=1, memory_bytes=1e9) for each in (2.0, 1.0))
    found = uneven_stages([slow, fast], held_bytes=[1] * 9, saved_bytes=[0] * 9, num_micro_batches=8, in_order=True)
    assert found.ends == (3, 9)
    assert found.seconds == 6.0


def test_a_device_with_little_memory_gets_fewer_units() -> None:
    kinds = [Kind(seconds=(1.0,) * 8, places=1, memory_bytes=memory) for memory in (2.5, 100.0)]
    found = uneven_stages(kinds, held_bytes=[1] * 8, saved_bytes=[0] * 8, num_micro_batches=1, in_order=True)
    assert found.ends == (2, 8)


def test_shares_are_those_of_the_speeds() -> None:
    assert micro_batch_shares([1.0, 2.0], 12) == (8, 4)
    assert micro_batch_shares([1.0, 1.0, 1.0], 7) in {(3, 2, 2), (2, 3, 2), (2, 2, 3)}


@pytest.mark.parametrize("seed", range(8))
def test_no_other_shares_end_earlier(seed) -> None:
    draw = random.Random(seed)
    seconds = [draw.uniform(0.5, 3) for _ in range(3)]
    shares = micro_batch_shares(seconds, 9)
    ends = max(count * each for count, each in zip(shares, seconds, strict=True))
    for a in range(1, 8):
        for b in range(1, 9 - a):
            assert ends <= max(a * seconds[0], b * seconds[1], (9 - a - b) * seconds[2]) + 1e-9


def test_fewer_micro_batches_than_replicas_is_an_error() -> None:
    with pytest.raises(LayoutError, match="fewer than 3"):
        micro_batch_shares([1.0] * 3, 2)
