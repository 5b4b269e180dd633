"""The sampler is a pure function, visits every sample once an epoch, and needs no state to resume."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.tasks import sample_indices
from shardwise.tasks.sampler import permute

seeds = st.integers(-(2**70), 2**70)


def positions(seed: int, first: int, count: int, num_samples: int) -> list[int]:
    """Samples at positions first, first + 1, ... by steps of one."""
    return [
        i
        for step in range(first, first + count)
        for i in sample_indices(seed=seed, step=step, global_batch=1, num_samples=num_samples)
    ]


@settings(deadline=None, max_examples=60)
@given(seed=seeds, epoch=st.integers(0, 2**40), num_samples=st.integers(1, 700))
def test_every_epoch_is_a_permutation(seed: int, epoch: int, num_samples: int) -> None:
    everything = np.arange(num_samples, dtype=np.uint64)
    visited = permute(everything, seed=seed, epoch=epoch, num_samples=num_samples)
    assert sorted(visited.tolist()) == list(range(num_samples))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, global_batch=st.integers(1, 40), num_samples=st.integers(1, 25))
def test_epochs_follow_each_other_whatever_the_batch(seed: int, global_batch: int, num_samples: int) -> None:
    num_steps = -(-3 * num_samples // global_batch)
    visited = [
        i
        for step in range(num_steps)
        for i in sample_indices(seed=seed, step=step, global_batch=global_batch, num_samples=num_samples)
    ]
    assert visited == positions(seed, 0, len(visited), num_samples)
    for epoch in range(3):
        part = visited[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # The first batch spans two epochs. The numbers were written down once; they never change.
    small = sample_indices(seed=7, step=1, global_batch=8, num_samples=10)
    assert small == (7, 2, 1, 4, 0, 5, 9, 7)
    large = sample_indices(seed=7, step=10**9, global_batch=4, num_samples=10**9)
    assert large == (41490191, 473887105, 196114984, 609054667)


def test_seeds_and_epochs_give_other_orders() -> None:
    first = positions(0, 0, 100, 100)
    assert first != list(range(100))
    assert first != positions(1, 0, 100, 100)
    assert first != positions(0, 100, 100, 100)
    assert positions(-1, 0, 100, 100) != positions(1, 0, 100, 100)


def test_a_resumed_run_sees_what_an_uninterrupted_one_sees() -> None:
    def run(steps: range) -> list[tuple[int, ...]]:
        return [sample_indices(seed=3, step=s, global_batch=6, num_samples=20) for s in steps]

    assert run(range(4)) + run(range(4, 12)) == run(range(12))


@pytest.mark.parametrize("num_samples", [5, 37, 1000])
def test_every_sample_comes_first_about_equally_often(num_samples: int) -> None:
    zero = np.zeros(1, dtype=np.uint64)
    num_epochs = 1500
    firsts = [int(permute(zero, seed=1, epoch=e, num_samples=num_samples)[0]) for e in range(num_epochs)]
    counts = np.bincount([i * 5 // num_samples for i in firsts], minlength=5)
    expected = np.bincount([i * 5 // num_samples for i in range(num_samples)]) / num_samples * num_epochs
    chi_squared = float((((counts - expected) ** 2) / expected).sum())
    assert chi_squared < 23.5  # 4 degrees of freedom: p = 1e-4, and the seed is fixed


def test_neighbours_are_spread_over_the_corpus() -> None:
    found = np.array(sample_indices(seed=0, step=0, global_batch=4096, num_samples=10**9), dtype=np.float64)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.06  # 4 / sqrt(4096)
    assert found.mean() == pytest.approx(5e8, rel=0.05)


def test_a_thousand_million_samples_cost_no_more_than_a_thousand() -> None:
    started = time.perf_counter()
    found = sample_indices(seed=0, step=10**7, global_batch=512, num_samples=10**9)
    assert time.perf_counter() - started < 20  # writing the permutation out would take minutes and 8 GB
    assert len(set(found)) == 512


@pytest.mark.parametrize(
    "step, global_batch, num_samples, said",
    [
        (-1, 1, 1, "step=-1"),
        (0, 0, 1, "at least 1 sample; got 0; give 1"),
        (0, 1, 0, "got 0; give a larger corpus"),
        (0, 1, 2**62 + 1, str(2**62 + 1)),
    ],
)
def test_numbers_out_of_range_are_refused(step: int, global_batch: int, num_samples: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sample_indices(seed=0, step=step, global_batch=global_batch, num_samples=num_samples)
