"""The learning rate: up in a line, down in a cosine, and a pure function of the step."""

from __future__ import annotations

import pytest

from shardwise.train.rate import learning_rate


def rates(**options: object) -> list[float]:
    return [learning_rate(s, peak=1.0, steps=11, warm_up=4, **options) for s in range(11)]  # type: ignore[arg-type]


def test_it_rises_to_the_peak_and_ends_at_the_final_fraction() -> None:
    found = rates(final_fraction=0.2)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[7] == pytest.approx(0.6)  # half way down, from 1 to 0.2
    assert found[-1] == pytest.approx(0.2)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_constant_stays_at_the_peak() -> None:
    assert rates(schedule="constant")[3:] == [1.0] * 8


def test_a_run_of_one_step_has_a_rate() -> None:
    assert learning_rate(0, peak=2.0, steps=1, warm_up=0) == 2.0
