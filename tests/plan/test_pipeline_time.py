"""Closed forms of pipelines against the simulator: equal where stages are equal, near where they are not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shardwise.plan.pipeline_time import PipelineTimes, costs_of_row, pipeline_seconds
from shardwise.schedule import GENERATORS, generate, seconds_of

CASES = [
    (name, chunks)
    for name, family in GENERATORS.items()
    for chunks in sorted({family.chunks[0], min(family.chunks[1] or 3, 3)})
]


def times(stages: int, *, message: float = 0.0, uneven: float = 0.0, seed: int = 0) -> PipelineTimes:
    """One row; a forward takes 1 s, a backward 2 s, half of it for weights, and stages up to `uneven` more."""
    drawn = np.random.default_rng(seed)
    forward = 1 + uneven * drawn.uniform(size=(1, stages))
    backward = 2 * (1 + uneven * drawn.uniform(size=(1, stages)))
    sent = np.full((1, stages), message)
    return PipelineTimes(forward=forward, backward=backward, weight=backward / 2, send=sent, back=sent)


def compared(name: str, chunks: int, ranks: int, count: int, row: PipelineTimes) -> tuple[float, float]:
    """By the formula, and by the simulator."""
    found = pipeline_seconds(row, np.array([float(count)]), schedule=name, chunks=chunks)[0]
    made = generate(name, num_ranks=ranks, num_micro_batches=count, chunks=chunks)
    return float(found), seconds_of(made, costs_of_row(row, 0))


@pytest.mark.parametrize(("name", "chunks"), CASES)
def test_equal_stages_and_free_messages_take_what_the_simulator_says(name: str, chunks: int) -> None:
    for ranks, count in itertools.product((2, 3, 4), (1, 2, 4, 8)):
        if name == "interleaved" and count % ranks and count > ranks:
            continue  # the last round is not full: see the next test
        found, exact = compared(name, chunks, ranks, count, times(ranks * chunks))
        assert found == pytest.approx(exact, rel=0.002), (ranks, count)


@pytest.mark.parametrize(("name", "chunks"), CASES)
def test_uneven_stages_and_messages_take_nearly_what_the_simulator_says(name: str, chunks: int) -> None:
    for ranks, count, message in itertools.product((2, 4), (1, 4, 8, 9), (0.0, 0.1)):
        row = times(ranks * chunks, message=message, uneven=0.5, seed=ranks + count)
        found, exact = compared(name, chunks, ranks, count, row)
        assert found == pytest.approx(exact, rel=0.12), (ranks, count, message)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2"])
def test_rows_are_priced_together_as_alone(schedule: str) -> None:
    """Also where a formula holds for one row, which has enough micro-batches, and not for the other."""
    one, other = times(4, uneven=0.3, seed=1), times(4, uneven=0.3, seed=2)
    both = PipelineTimes(
        **{name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in vars(one)},
    )
    counts = np.array([4.0, 9.0])
    together = pipeline_seconds(both, counts, schedule=schedule, chunks=1)
    alone = [
        pipeline_seconds(row, counts[place : place + 1], schedule=schedule, chunks=1)[0]
        for place, row in enumerate((one, other))
    ]
    assert together == pytest.approx(alone)


def test_bubbles_are_those_of_the_papers() -> None:
    """GPipe and 1F1B (p-1)/m of the ideal time, interleaved a v-th of it (arXiv:2104.04473, section 2.2)."""
    count, ranks, ideal = 8, 4, 8 * 3.0
    for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2)):
        row = times(ranks * chunks)
        found = pipeline_seconds(row, np.array([float(count)]), schedule=name, chunks=chunks)[0]
        assert found / (ideal * chunks) - 1 == pytest.approx((ranks - 1) / count / chunks)
